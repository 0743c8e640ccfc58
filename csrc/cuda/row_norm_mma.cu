// Row norms of larger ranks: W + s B A on tensor cores, 16 rows and 32 columns a warp.
//
// A product of 16 rows, 16 ranks and 8 columns takes the ranks and columns in an order of our own,
// so that a lane's operands are adjacent in memory. With g = lane / 4 and t = lane % 4, a lane
// holds of A the columns 4g to 4g + 3 (one for each of four products) at ranks 4t to 4t + 3, and
// of the products the columns 8t to 8t + 7 of rows g and g + 8: column 8t + j + 4p is the
// accumulators' column 2t + p in product j.
#include "mma.h"
#include "row_norm.h"

namespace flatkern::cuda {

constexpr int kMmaRanks = 16;
constexpr int kMmaCols = 32;
// Blocks of ranks whose part of sB is kept in shared memory, split; beyond, every use splits it.
constexpr int kStagedBlocks = 8;

// This lane's part of sB, from its first row and its first rank on: zeros past the last ones.
__device__ __forceinline__ SplitLeft load_left(const RowNormArgs& args, int64_t row, int64_t rank) {
  float b[2][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = row + 8 * half;
      b[half][i] =
          at < args.rows && rank + i < args.rank ? args.lora_B[at * args.rank + rank + i] : 0.0f;
    }
  }
  SplitLeft left;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float* pair = &b[word % 2][word / 2 * 2];
    split_pair(pair[0], pair[1], left.part[0].w[word], left.part[1].w[word], left.part[2].w[word]);
  }
  return left;
}

// kVector merged columns of a row, from the accumulators of its half of the rows.
template <class T>
__device__ __forceinline__ float square_sum(const Packed<T>& weight, const float (*products)[4],
                                            int half) {
  float merged[kVector], sum = 0.0f;
  to_floats(weight, merged);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    merged[i] += products[i % 4][2 * half + i / 4];
    sum = fmaf(merged[i], merged[i], sum);
  }
  return sum;
}

// A block takes Tiles times kMmaRows rows, which share what a warp loads and splits of A; its
// warps take turns at the columns.
template <int Tiles, class T, bool Aligned>
__global__ void __launch_bounds__(kThreads) row_norm_mma_kernel(RowNormArgs args) {
  constexpr int kRows = Tiles * kMmaRows;
  __shared__ SplitLeft staged[kStagedBlocks][Tiles][kWarp];
  __shared__ double partial[kWarpsPerBlock][kRows];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = lane / 4, member = lane % 4;
  const int blocks = static_cast<int>(divide_up(args.rank, kMmaRanks));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows; row < args.rows; row += stride) {
    const auto left_of = [&](int block, int tile) {
      return load_left(args, row + tile * kMmaRows + group, block * kMmaRanks + 4 * member);
    };
    for (int i = warp; i < Tiles * blocks && i < Tiles * kStagedBlocks; i += kWarpsPerBlock) {
      staged[i / Tiles][i % Tiles][lane] = left_of(i / Tiles, i % Tiles);
    }
    __syncthreads();

    double shares[Tiles][2] = {};
    for (int64_t first = warp * kMmaCols; first < args.cols; first += kThreads / kWarp * kMmaCols) {
      const int64_t j = first + member * kVector;
      Packed<T> packed[Tiles][2] = {};
#pragma unroll
      for (int r = 0; r < 2 * Tiles; ++r) {
        const int64_t at = row + 8 * r + group;
        const T* here = static_cast<const T*>(args.weight) + at * args.weight_stride;
        if (at < args.rows) {
          packed[r / 2][r % 2] = Aligned && j + kVector <= args.cols
                                     ? load_packed(here + j)
                                     : load_padded(here, j, args.cols);
        }
      }
      float products[Tiles][4][4] = {};
      const bool inside = first + 4 * group < args.lora_A_stride;
      const float* lora_A = args.lora_A + 4 * member * args.lora_A_stride + first + 4 * group;
      for (int block = 0; block < blocks; ++block) {
        Bits128 a[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (inside && block * kMmaRanks + 4 * member + i < args.rank) {
            a[i] = *reinterpret_cast<const Bits128*>(lora_A + i * args.lora_A_stride);
          }
        }
        lora_A += kMmaRanks * args.lora_A_stride;
        SplitLeft left[Tiles];
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          left[tile] = block < kStagedBlocks ? staged[block][tile][lane] : left_of(block, tile);
        }
#pragma unroll
        for (int product = 0; product < 4; ++product) {
          SplitRight right;
#pragma unroll
          for (int word = 0; word < 2; ++word) {
            split_pair(float_of_bits(a[2 * word].w[product]),
                       float_of_bits(a[2 * word + 1].w[product]), right.part[0][word],
                       right.part[1][word], right.part[2][word]);
          }
#pragma unroll
          for (int tile = 0; tile < Tiles; ++tile) {
            mma_split(products[tile][product], left[tile], right);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2 * Tiles; ++r) {
        shares[r / 2][r % 2] += square_sum(packed[r / 2][r % 2], products[r / 2], r % 2);
      }
    }

#pragma unroll
    for (int r = 0; r < 2 * Tiles; ++r) {
      double share = shares[r / 2][r % 2];
      share += __shfl_xor_sync(0xFFFFFFFFu, share, 1);
      share += __shfl_xor_sync(0xFFFFFFFFu, share, 2);
      if (member == 0) partial[warp][8 * r + group] = share;
    }
    __syncthreads();
    for (int r = warp; r < kRows && row + r < args.rows; r += kWarpsPerBlock) {
      const double share = lane < kWarpsPerBlock ? partial[lane][r] : 0.0;
      const float norm = finish_row<T>(args, row + r, share);
      if (lane == 0) args.norm[row + r] = norm;
    }
  }
}

template <int Tiles, class T>
static void launch_tiles(const RowNormArgs& args, int sm_count, cudaStream_t stream) {
  const int blocks = mma_blocks(args.rows, Tiles, sm_count);
  if (is_vector_aligned(args.weight, args.weight_stride, args.weight_dtype)) {
    FLATKERN_LAUNCH((row_norm_mma_kernel<Tiles, T, true>), blocks, kThreads, stream, args);
  } else {
    FLATKERN_LAUNCH((row_norm_mma_kernel<Tiles, T, false>), blocks, kThreads, stream, args);
  }
}

void launch_row_norm_mma(const RowNormArgs& args, int sm_count, cudaStream_t stream) {
  with_type(args.weight_dtype, [&](auto weight) {
    using T = decltype(weight);
    if (mma_tiles(args.rows, sm_count) == 2) {
      launch_tiles<2, T>(args, sm_count, stream);
    } else {
      launch_tiles<1, T>(args, sm_count, stream);
    }
  });
}

}  // namespace flatkern::cuda

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

// This lane's part of A for a product, from four columns at its four ranks.
__device__ __forceinline__ SplitRight split_right(const Bits128* a, int product) {
  SplitRight right;
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    split_pair(float_of_bits(a[2 * word].w[product]), float_of_bits(a[2 * word + 1].w[product]),
               right.part[0][word], right.part[1][word], right.part[2][word]);
  }
  return right;
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
// warps take turns at the columns. Two blocks fit an SM.
template <int Tiles, class T, bool Aligned>
__global__ void __launch_bounds__(kThreads, 2)
    row_norm_mma_kernel(const __grid_constant__ Table<RowNormArgs> table) {
  const Place place = place_of(table, blockIdx.x);
  const RowNormArgs& args = table.tensors[place.tensor];
  constexpr int kRows = Tiles * kMmaRows;
  __shared__ SplitLeft staged[kStagedBlocks][Tiles][kWarp];
  // Each thread's share of its rows' sums.
  __shared__ double shares[2 * Tiles][kThreads];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = lane / 4, member = lane % 4;
  const int rank = static_cast<int>(args.rank);
  const int blocks = static_cast<int>(divide_up(rank, kMmaRanks));
  const int64_t row = static_cast<int64_t>(place.block) * kRows;
  const auto left_of = [&](int block, int tile) {
    return load_left(args, row + tile * kMmaRows + group, block * kMmaRanks + 4 * member);
  };
  for (int i = warp; i < Tiles * blocks && i < Tiles * kStagedBlocks; i += kWarpsPerBlock) {
    staged[i / Tiles][i % Tiles][lane] = left_of(i / Tiles, i % Tiles);
  }
  __syncthreads();

#pragma unroll
  for (int r = 0; r < 2 * Tiles; ++r) shares[r][threadIdx.x] = 0.0;
  const int steps = static_cast<int>(divide_up(args.cols, kMmaCols));
  for (int step = warp; step < steps; step += kWarpsPerBlock) {
    const int64_t first = static_cast<int64_t>(step) * kMmaCols;
    float products[Tiles][4][4] = {};
    const float* next = args.lora_A + 4 * member * args.lora_A_stride + first + 4 * group;
    const bool inside = first + 4 * group < args.lora_A_stride;
    int ranks = rank;
    // Four columns at this lane's ranks, zeros past the last column or rank.
    Bits128 a[4];
    const auto load_next = [&] {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = inside && 4 * member + i < ranks
                   ? reinterpret_cast<const Bits128*>(next + i * args.lora_A_stride)[0]
                   : Bits128{};
      }
      next += kMmaRanks * args.lora_A_stride;
      ranks -= kMmaRanks;
    };
    SplitRight right[4];
    const auto split = [&] {
#pragma unroll
      for (int product = 0; product < 4; ++product) right[product] = split_right(a, product);
    };
    const auto multiply = [&](const SplitLeft& left, int tile) {
#pragma unroll
      for (int product = 0; product < 4; ++product) {
        mma_split(products[tile][product], left, right[product]);
      }
    };
    load_next();
    int block = 0;
    for (; block < blocks && block < kStagedBlocks; ++block) {
      split();
      load_next();
      // Else the compiler saves registers by loading at the end, just before the use.
      __syncwarp();
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) multiply(staged[block][tile][lane], tile);
    }
    for (; block < blocks; ++block) {
      split();
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) multiply(left_of(block, tile), tile);
      load_next();
    }
    // Loaded last: the registers are needed above, and other warps multiply meanwhile.
    const int64_t j = first + member * kVector;
    Packed<T> packed[2 * Tiles] = {};
#pragma unroll
    for (int r = 0; r < 2 * Tiles; ++r) {
      const int64_t at = row + 8 * r + group;
      const T* here = static_cast<const T*>(args.weight) + at * args.weight_stride;
      if (at < args.rows) {
        packed[r] = Aligned && j + kVector <= args.cols ? load_packed(here + j)
                                                        : load_padded(here, j, args.cols);
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * Tiles; ++r) {
      shares[r][threadIdx.x] += square_sum(packed[r], products[r / 2], r % 2);
    }
  }
  __syncthreads();
  // Four lanes of each of the eight warps have a share in a row.
  for (int r = warp; r < kRows && row + r < args.rows; r += kWarpsPerBlock) {
    const double share = shares[r / 8][lane / 4 * kWarp + 4 * (r % 8) + lane % 4];
    const float norm = finish_row<T>(args, row + r, share);
    if (lane == 0) args.norm[row + r] = norm;
  }
}

template <int Tiles, class T>
static void launch_table(const Table<RowNormArgs>& table, cudaStream_t stream) {
  const int blocks = static_cast<int>(table.blocks());
  if (is_aligned(table.tensors[0])) {
    FLATKERN_LAUNCH((row_norm_mma_kernel<Tiles, T, true>), blocks, kThreads, stream, table);
  } else {
    FLATKERN_LAUNCH((row_norm_mma_kernel<Tiles, T, false>), blocks, kThreads, stream, table);
  }
}

template <int Tiles>
static void launch_tiles(const std::vector<RowNormArgs>& tensors, cudaStream_t stream) {
  const auto blocks = [](const RowNormArgs& args) {
    return static_cast<uint32_t>(divide_up(args.rows, Tiles * kMmaRows));
  };
  for (const Table<RowNormArgs>& table : tables_of(tensors, row_norm_variant, blocks)) {
    with_type(table.tensors[0].weight_dtype,
              [&](auto weight) { launch_table<Tiles, decltype(weight)>(table, stream); });
  }
}

void launch_row_norm_mma(const std::vector<RowNormArgs>& tensors, int sm_count,
                         cudaStream_t stream) {
  int64_t rows = 0;
  for (const RowNormArgs& args : tensors) rows += args.rows;
  if (mma_tiles(rows, sm_count) == 2) {
    launch_tiles<2>(tensors, stream);
  } else {
    launch_tiles<1>(tensors, stream);
  }
}

}  // namespace flatkern::cuda

// Row norms: W goes from memory to the tensor cores in 128-bit loads, as their right operand.
#include <algorithm>
#include <tuple>

#include "row_norm.h"

namespace flatkern::cuda {

// bfloat16 parts that hold an element exactly.
template <class T>
constexpr int kElementParts = std::is_same_v<T, BFloat16>  ? 1
                              : std::is_same_v<T, Float16> ? 2
                                                           : kParts;

// The parts of kVector adjacent elements, in a product's order.
template <class T>
FLATKERN_HD void split(const Packed<T>& packed, Bits128* part) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    part[0] = packed.bits[0];
  } else {
    float values[kVector];
    to_floats(packed, values);
    for (int i = 0; i < kVector / 2; ++i) {
      uint32_t word[kParts];
      split_pair(values[2 * i], values[2 * i + 1], word[0], word[1], word[2]);
      for (int p = 0; p < kElementParts<T>; ++p) part[p].w[i] = word[p];
    }
  }
}

// kVector columns of a row from column j on, zeros past its end.
template <class T>
FLATKERN_HD Packed<T> load_padded(const T* row, int64_t j, int64_t cols) {
  Packed<T> packed = {};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (j + i < cols) packed.bits[i / 4].w[i % 4] = bits_of_float(row[j + i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (j + i < cols) packed.bits[0].w[i / 2] |= uint32_t{row[j + i].bits} << (16 * (i % 2));
    }
  }
  return packed;
}

// Two chains of four, so that no summand is rounded often.
template <class T>
FLATKERN_HD float square_sum(const Packed<T>& packed) {
  float values[kVector], sums[2] = {};
  to_floats(packed, values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[i % 2] = fmaf(values[i], values[i], sums[i % 2]);
  return sums[0] + sums[1];
}

// b.(A A^T b) and the sum of |b_k| |A_k| of kFormRows rows, by one warp; infinite where A cannot be
// split.
constexpr int kFormRows = 4;
__device__ __forceinline__ void write_forms(const NormScratch& scratch, int64_t row) {
  const int lane = threadIdx.x % kWarp, column = lane % kRankBlock;
  const int first = lane / kRankBlock * (kRankBlock / 2);
  const float* lora_B = scratch.lora_B() + row * scratch.ranks;
  const double* gram = scratch.gram() + first * kRankBlock + column;
  double form[kFormRows] = {}, u[kFormRows] = {};
  for (int pair = 0; pair < scratch.blocks * scratch.blocks; ++pair) {
    double g[kRankBlock / 2] = {};
    for (int part = 0; part < scratch.gram_parts; ++part, gram += kThreads) {
#pragma unroll
      for (int i = 0; i < kRankBlock / 2; ++i) g[i] += gram[i * kRankBlock];
    }
    const int k = pair / scratch.blocks * kRankBlock + first;
    const int l = pair % scratch.blocks * kRankBlock + column;
    double square = 0.0;  // of the row l of A, in one of its lanes
#pragma unroll
    for (int i = 0; i < kRankBlock / 2; ++i) square = k + i == l ? g[i] : square;
    const double norm = sqrt(square);
    const double size = square == 0.0 || splits(norm) ? norm : static_cast<double>(INFINITY);
#pragma unroll
    for (int r = 0; r < kFormRows; ++r) {
      const float* b = lora_B + r * scratch.ranks;
      const double own = b[l];
      double product = 0.0;
#pragma unroll
      for (int i = 0; i < kRankBlock / 2; ++i) {
        product = fma(g[i], static_cast<double>(b[k + i]), product);
      }
      form[r] = fma(product, own, form[r]);
      u[r] += own == 0.0 ? 0.0 : fabs(own) * size;
    }
  }
#pragma unroll
  for (int r = 0; r < kFormRows; ++r) {
    form[r] = warp_sum(form[r]);
    u[r] = warp_sum(u[r]);
    if (lane == 0) {
      scratch.forms()[2 * (row + r)] = form[r];
      scratch.forms()[2 * (row + r) + 1] = u[r];
    }
  }
}

// In float64 throughout, by one warp.
template <class T>
__device__ __noinline__ double row_square_wide(const RowNormArgs& args, const float* lora_B,
                                               int64_t row) {
  const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride;
  double sum = 0.0;
  for (int64_t j = threadIdx.x % kWarp; j < args.cols; j += kWarp) {
    double merged = to_float(weight[j]);
    for (int64_t k = 0; k < args.rank; ++k) {
      merged = fma(static_cast<double>(lora_B[k]),
                   static_cast<double>(adapter_at(args.lora_A, k, j)), merged);
    }
    sum = fma(merged, merged, sum);
  }
  return warp_sum(sum);
}

// Adds up the panels of a block's rows; forms those again whose sum is not accurate.
template <int Rows, class T>
__device__ __forceinline__ void finish_rows(const RowNormArgs& args, const NormScratch& scratch,
                                            int64_t first) {
  __shared__ int refused[Rows], count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  const int64_t row = first + threadIdx.x;
  if (threadIdx.x < Rows && row < args.rows) {
    double squares = 0.0, sum = 0.0, u = 0.0;
    for (int64_t at = row; at < scratch.panels * scratch.rows; at += scratch.rows) {
      squares += __ldcg(scratch.squares() + at);
      if (args.rank > 0) sum += __ldcg(scratch.crosses() + at);
    }
    sum = fma(2.0, sum, squares);
    if (args.rank > 0) {
      sum += __ldcg(scratch.forms() + 2 * row);
      u = __ldcg(scratch.forms() + 2 * row + 1);
    }
    if (is_accurate(sum, squares, u, scratch.blocks)) {
      args.norm[row] = sqrtf(static_cast<float>(sum)) * args.relative_scale;
    } else {
      refused[atomicAdd(&count, 1)] = threadIdx.x;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x / kWarp; i < count; i += kWarpsPerBlock) {
    const int64_t again = first + refused[i];
    const double sum = row_square_wide<T>(args, scratch.lora_B() + again * scratch.ranks, again);
    if (threadIdx.x % kWarp == 0) {
      args.norm[again] = static_cast<float>(sqrt(sum)) * args.relative_scale;
    }
  }
}

// Blocks of ranks are gone through `Blocks` at a time, with the panel of W read again for each.
template <int Blocks, class T, bool Aligned>
__global__ void __launch_bounds__(kThreads, 2)
    row_norm_kernel(const __grid_constant__ Table<RowNormArgs> table) {
  constexpr Dtype kDtype = std::is_same_v<T, BFloat16>  ? Dtype::kBFloat16
                           : std::is_same_v<T, Float16> ? Dtype::kFloat16
                                                        : Dtype::kFloat32;
  constexpr int kGroups = norm_groups(kDtype), kRows = norm_rows(kDtype);
  // Steps in an iteration, whose loads fly together; steps whose parts of A are staged.
  constexpr int kSteps = Blocks < 2 && kElementParts<T> == 1 ? 2 : 1;
  constexpr int kStaged = Blocks == 0 ? kPanelSteps : kPanelSteps / Blocks;
  __shared__ Bits128 staged[Blocks == 0 ? 1 : kPanelSteps * kStepWords];
  __shared__ bool last;
  // In shared memory, for registers are few.
  __shared__ NormScratch scratch;

  const Place place = place_of(table, blockIdx.x);
  const RowNormArgs& args = table.tensors[place.tensor];
  if (threadIdx.x == 0) scratch = scratch_of(args);
  __syncthreads();
  const uint32_t panel = place.block % scratch.panels, row_block = place.block / scratch.panels;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = lane / 4, member = lane % 4;
  const int64_t first_row = static_cast<int64_t>(row_block) * kRows;
  const int64_t own_row = first_row + warp * 8 * kGroups;
  const int64_t begin = static_cast<int64_t>(panel) * kPanelCols;
  const bool whole = Aligned && begin + kPanelCols <= args.cols;
  const int64_t left_steps = divide_up(args.cols - begin, kStepCols);
  const int steps = left_steps < kPanelSteps ? static_cast<int>(left_steps) : kPanelSteps;

  // Past the last row the last is read; nobody reads what comes of it.
  const T* weight[kGroups];
#pragma unroll
  for (int r = 0; r < kGroups; ++r) {
    const int64_t row = own_row + 8 * r + group;
    weight[r] = static_cast<const T*>(args.weight) +
                (row < args.rows ? row : args.rows - 1) * args.weight_stride + begin +
                member * kVector;
  }
  Packed<T> packed[kSteps][kGroups];
  const auto load = [&](int step) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t j = (step + s) * kStepCols;
      const int64_t left = args.cols - begin - member * kVector;
#pragma unroll
      for (int r = 0; r < kGroups; ++r) {
        packed[s][r] = whole || (Aligned && j + kVector <= left) ? load_packed(weight[r] + j)
                                                                 : load_padded(weight[r], j, left);
      }
    }
  };
  load(0);
  if constexpr (Blocks > 0) {
    // This panel's share of the rows' forms, while W is on its way.
    const int stride = scratch.panels * kWarpsPerBlock;
    for (int i = panel + scratch.panels * warp; i < kRows / kFormRows; i += stride) {
      write_forms(scratch, first_row + i * kFormRows);
    }
  }
  float squares[kGroups] = {}, crosses[kGroups][2] = {};
  int block = 0;
  do {
    // A w of each rank and row.
    float products[Blocks == 0 ? 1 : Blocks][kGroups][4] = {};
#pragma unroll
    for (int r = 0; r < kGroups; ++r) squares[r] = 0.0f;
#pragma unroll 1
    for (int stage = 0; stage < steps; stage += kStaged) {
      if constexpr (Blocks > 0) {
        const int64_t step = static_cast<int64_t>(panel) * kPanelSteps + stage;
        const Bits128* from =
            scratch.words() +
            (static_cast<int64_t>(block) * scratch.panels * kPanelSteps + step * Blocks) *
                kStepWords;
        __syncthreads();
        for (int i = threadIdx.x; i < kPanelSteps * kStepWords; i += kThreads) staged[i] = from[i];
        __syncthreads();
      }
      const int end = stage + kStaged < steps ? stage + kStaged : steps;
#pragma unroll 1
      for (int step = stage; step < end; step += kSteps) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          Bits128 parts[kGroups][kElementParts<T>];
#pragma unroll
          for (int r = 0; r < kGroups; ++r) {
            squares[r] += square_sum(packed[s][r]);
            if constexpr (Blocks > 0) split(packed[s][r], parts[r]);
          }
#pragma unroll
          for (int b = 0; b < Blocks; ++b) {
            const Bits128* words = staged + ((step - stage + s) * Blocks + b) * kStepWords + lane;
            // The smallest products first, for tensor cores truncate by the largest; then apart
            // from the sum over the panel, so that no chain is long.
            float sums[kGroups][4] = {};
#pragma unroll
            for (int p = kParts - 1; p >= 0; --p) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const Bits128 left = words[(p * 2 + half) * kWarp];
#pragma unroll
                for (int q = kElementParts<T> - 1; q >= 0; --q) {
                  if (p + q >= kParts) continue;
#pragma unroll
                  for (int r = 0; r < kGroups; ++r) {
                    const uint32_t right[2] = {parts[r][q].w[2 * half],
                                               parts[r][q].w[2 * half + 1]};
                    mma(sums[r], left.w, right);
                  }
                }
              }
            }
#pragma unroll
            for (int r = 0; r < kGroups; ++r) {
#pragma unroll
              for (int i = 0; i < 4; ++i) products[b][r][i] += sums[r][i];
            }
          }
        }
        if (step + kSteps < steps) load(step + kSteps);
      }
    }
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
#pragma unroll
      for (int r = 0; r < kGroups; ++r) {
        const float* lora_B = scratch.lora_B() + (own_row + 8 * r + 2 * member) * scratch.ranks +
                              (block + b) * kRankBlock + group;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float factor = lora_B[i % 2 * scratch.ranks + i / 2 * 8];
          crosses[r][i % 2] = fmaf(factor, products[b][r][i], crosses[r][i % 2]);
        }
      }
    }
    block += Blocks;
    if (block < scratch.blocks) load(0);
  } while (block < scratch.blocks);

#pragma unroll
  for (int r = 0; r < kGroups; ++r) {
    const int64_t at = panel * scratch.rows + own_row + 8 * r;
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      squares[r] += __shfl_xor_sync(0xFFFFFFFFu, squares[r], distance);
    }
    if (member == 0) scratch.squares()[at + group] = squares[r];
    if constexpr (Blocks > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int distance = 4; distance < kWarp; distance *= 2) {
          crosses[r][i] += __shfl_xor_sync(0xFFFFFFFFu, crosses[r][i], distance);
        }
        if (group == 0) scratch.crosses()[at + 2 * member + i] = crosses[r][i];
      }
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(scratch.done() + row_block, 1u) + 1 == static_cast<uint32_t>(scratch.panels);
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  finish_rows<kRows, T>(args, scratch, first_row);
}

template <int Blocks, class T>
static void launch_aligned(const Table<RowNormArgs>& table, bool aligned, cudaStream_t stream) {
  const int grid = static_cast<int>(table.blocks());
  if (aligned) {
    FLATKERN_LAUNCH((row_norm_kernel<Blocks, T, true>), grid, kThreads, stream, table);
  } else {
    FLATKERN_LAUNCH((row_norm_kernel<Blocks, T, false>), grid, kThreads, stream, table);
  }
}

static bool is_aligned(const RowNormArgs& args) {
  return is_vector_aligned(args.weight, args.weight_stride, args.weight_dtype);
}

// Those that one launch does, of one kernel each.
static std::vector<Table<RowNormArgs>> norm_tables(const std::vector<RowNormArgs>& tensors) {
  const auto variant = [](const RowNormArgs& args) {
    return std::make_tuple(args.weight_dtype, is_aligned(args), norm_blocks(args.rank));
  };
  const auto blocks = [](const RowNormArgs& args) {
    const NormScratch scratch = scratch_of(args);
    return static_cast<uint32_t>(scratch.row_blocks * scratch.panels);
  };
  return tables_of(tensors, variant, blocks);
}

static int64_t scratch_bytes(const Table<RowNormArgs>& table) {
  int64_t bytes = 0;
  for (uint32_t i = 0; i < table.count; ++i) {
    bytes += static_cast<int64_t>(scratch_of(table.tensors[i]).bytes);
  }
  return bytes;
}

// Launches follow one another, so that they share it.
int64_t row_norm_scratch(const std::vector<RowNormArgs>& tensors) {
  int64_t bytes = 0;
  for (const auto& table : norm_tables(tensors)) bytes = std::max(bytes, scratch_bytes(table));
  return bytes;
}

void launch_row_norm(const std::vector<RowNormArgs>& tensors, void* scratch, cudaStream_t stream) {
  for (Table<RowNormArgs>& table : norm_tables(tensors)) {
    char* at = static_cast<char*>(scratch);
    for (uint32_t i = 0; i < table.count; ++i) {
      table.tensors[i].scratch = at;
      at += scratch_of(table.tensors[i]).bytes;
    }
    launch_row_norm_prepare(table, stream);
    const RowNormArgs& first = table.tensors[0];
    with_type(first.weight_dtype, [&](auto weight) {
      using T = decltype(weight);
      switch (norm_blocks(first.rank)) {
        case 0:
          return launch_aligned<0, T>(table, is_aligned(first), stream);
        case 1:
          return launch_aligned<1, T>(table, is_aligned(first), stream);
        default:
          return launch_aligned<2, T>(table, is_aligned(first), stream);
      }
    });
  }
}

}  // namespace flatkern::cuda

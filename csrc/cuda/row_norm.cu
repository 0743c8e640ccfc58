// Row norms: a warp takes one row, or kNormRows rows that share its loads of A.
#include "row_norm.h"

namespace flatkern::cuda {

template <int Rows, class T, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    row_norm_kernel(const __grid_constant__ Table<RowNormArgs> table) {
  const Place place = place_of(table, blockIdx.x);
  const RowNormArgs& args = table.tensors[place.tensor];
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(place.blocks) * kWarpsPerBlock;
  const int64_t warp = static_cast<int64_t>(place.block) * kWarpsPerBlock + threadIdx.x / kWarp;
  for (int64_t row = warp * Rows; row + Rows <= args.rows; row += warps * Rows) {
    const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride;
    const float* lora_B = args.lora_B + row * args.rank;
    const auto b = [&](int k, int r) { return lora_B[r * args.rank + k]; };
    double shares[Rows] = {};
    for (int64_t j = lane * kVector; j < args.cols; j += kWarpCols) {
      Packed<T> packed[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const T* here = weight + r * args.weight_stride;
        packed[r] = Aligned && j + kVector <= args.cols ? load_packed(here + j)
                                                        : load_padded(here, j, args.cols);
      }
      float sums[Rows];
      square_sums<Rows, 4>(args, packed, b, j, sums);
#pragma unroll
      for (int r = 0; r < Rows; ++r) shares[r] += sums[r];
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const float norm = finish_row<T>(args, row + r, shares[r]);
      if (lane == 0) args.norm[row + r] = norm;
    }
  }
}

template <int Rows, class T>
static void launch_table(const Table<RowNormArgs>& table, cudaStream_t stream) {
  const int blocks = static_cast<int>(table.blocks());
  if (is_aligned(table.tensors[0])) {
    FLATKERN_LAUNCH((row_norm_kernel<Rows, T, true>), blocks, kThreads, stream, table);
  } else {
    FLATKERN_LAUNCH((row_norm_kernel<Rows, T, false>), blocks, kThreads, stream, table);
  }
}

template <int Rows>
static void launch_rows(const std::vector<RowNormArgs>& tensors, int sm_count,
                        cudaStream_t stream) {
  const auto blocks = [&](const RowNormArgs& args) {
    return grid_blocks(divide_up(args.rows, Rows), sm_count);
  };
  for (const Table<RowNormArgs>& table : tables_of(tensors, row_norm_variant, blocks)) {
    with_type(table.tensors[0].weight_dtype,
              [&](auto weight) { launch_table<Rows, decltype(weight)>(table, stream); });
  }
}

// The rows from `first` on.
static RowNormArgs rows_from(RowNormArgs args, int64_t first) {
  args.rows -= first;
  args.weight = static_cast<const char*>(args.weight) +
                first * args.weight_stride * size_of(args.weight_dtype);
  args.lora_B += first * args.rank;
  args.norm += first;
  return args;
}

void launch_row_norm(const std::vector<RowNormArgs>& tensors, int sm_count, cudaStream_t stream) {
  std::vector<RowNormArgs> direct, large;
  int64_t rows = 0;
  for (const RowNormArgs& args : tensors) {
    const bool is_large = args.rank > kDirectRank && args.cols > 0;
    (is_large ? large : direct).push_back(args);
    rows += is_large ? 0 : args.rows;
  }
  launch_row_norm_mma(large, sm_count, stream);
  if (!norm_shares_rows(rows, sm_count)) return launch_rows<1>(direct, sm_count, stream);
  std::vector<RowNormArgs> rest;
  for (RowNormArgs& args : direct) {
    const int64_t shared = args.rows / kNormRows * kNormRows;
    rest.push_back(rows_from(args, shared));
    args.rows = shared;
  }
  launch_rows<kNormRows>(direct, sm_count, stream);
  launch_rows<1>(rest, sm_count, stream);
}

}  // namespace flatkern::cuda

// Row norms: a warp takes one row, or kNormRows rows that share its loads of A.
#include "row_norm.h"

namespace flatkern::cuda {

template <int Rows, class T, bool Aligned>
__global__ void __launch_bounds__(kThreads) row_norm_kernel(RowNormArgs args) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
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
static void launch_rows(const RowNormArgs& args, int sm_count, cudaStream_t stream) {
  const int blocks = grid_blocks(divide_up(args.rows, Rows), sm_count);
  if (is_vector_aligned(args.weight, args.weight_stride, args.weight_dtype)) {
    FLATKERN_LAUNCH((row_norm_kernel<Rows, T, true>), blocks, kThreads, stream, args);
  } else {
    FLATKERN_LAUNCH((row_norm_kernel<Rows, T, false>), blocks, kThreads, stream, args);
  }
}

void launch_row_norm(const RowNormArgs& args, int sm_count, cudaStream_t stream) {
  if (args.rows == 0) return;
  if (args.rank > kDirectRank && args.cols > 0) return launch_row_norm_mma(args, sm_count, stream);
  with_type(args.weight_dtype, [&](auto weight) {
    using T = decltype(weight);
    const int64_t shared = norm_shares_rows(args.rows, sm_count) ? args.rows / kNormRows : 0;
    if (shared != 0) {
      RowNormArgs first = args;
      first.rows = shared * kNormRows;
      launch_rows<kNormRows, T>(first, sm_count, stream);
    }
    const int64_t done = shared * kNormRows;
    if (done == args.rows) return;
    RowNormArgs rest = args;
    rest.rows -= done;
    rest.weight = static_cast<const T*>(args.weight) + done * args.weight_stride;
    rest.lora_B += done * args.rank;
    rest.norm += done;
    launch_rows<1, T>(rest, sm_count, stream);
  });
}

}  // namespace flatkern::cuda

// Row norm, scale and perturbation: one pass where a row fits a block's registers.
#include "perturb.h"
#include "row_norm.h"

namespace flatkern::cuda {

// A block holds kFusedRows rows, kVector columns of each a thread, from the first read to the
// write. The row's last vector may be cut: it is padded for the norm and done one by one after it.
// Of 16-bit rows two blocks fit an SM, so that one loads while the other computes; unrolled, their
// loop over the ranks would need more than those 64 registers a thread.
template <class T, bool Elementwise>
__global__ void __launch_bounds__(kFusedThreads, sizeof(T) == 4 ? 1 : 2)
    perturb_merged_kernel(PerturbMergedArgs args) {
  __shared__ float partial[kFusedRows][kFusedThreads];
  __shared__ float scales[kFusedRows];
  __shared__ float lora_B[kDirectRank][kFusedRows];
  const PerturbArgs& perturb = args.perturb;
  const RowNormArgs& norm = args.row_norm;
  const Window& window = perturb.window;
  const NoiseKey key = load_key(window.key);
  const int64_t j = static_cast<int64_t>(threadIdx.x) * kVector;
  const bool whole = j + kVector <= window.cols, any = j < window.cols;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kFusedRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kFusedRows; row < window.rows;
       row += stride) {
    const int rows =
        window.rows - row < kFusedRows ? static_cast<int>(window.rows - row) : kFusedRows;
    T* weight = static_cast<T*>(perturb.out) + row * perturb.out_stride;
    Packed<T> packed[kFusedRows] = {};
#pragma unroll
    for (int r = 0; r < kFusedRows; ++r) {
      const T* here = weight + r * perturb.out_stride;
      if (r < rows && whole) packed[r] = load_packed(here + j);
      if (r < rows && any && !whole) packed[r] = load_padded(here, j, window.cols);
    }
    for (int i = threadIdx.x; i < rows * norm.rank; i += blockDim.x) {
      const int r = i / static_cast<int>(norm.rank), k = i % static_cast<int>(norm.rank);
      lora_B[k][r] = norm.lora_B[row * norm.rank + i];
    }
    __syncthreads();
    // Of rows past the last one the sums are not used.
    float sums[kFusedRows] = {};
    if (any) {
      square_sums<kFusedRows, sizeof(T) == 4 ? 4 : 1>(
          norm, packed, [&](int k, int r) { return lora_B[k][r]; }, j, sums);
    }
#pragma unroll
    for (int r = 0; r < kFusedRows; ++r) partial[r][threadIdx.x] = sums[r];
    __syncthreads();
    // A warp sums a row as a row-norm warp would: a lane's vectors in column order.
    for (int r = warp; r < rows; r += warps) {
      double share = 0.0;
      for (int w = 0; w < warps; ++w) share += partial[r][w * kWarp + lane];
      const float scale = finish_row<T>(norm, row + r, share);
      if (lane == 0) scales[r] = norm.norm[row + r] = scale;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kFusedRows; ++r) {
      if (r >= rows || !any) continue;
      const PhiloxRow philox = philox_row(key, static_cast<uint32_t>(window.row_offset + row + r));
      const RowScale c = row_scale_of(scales[r]);
      T* here = weight + r * perturb.out_stride;
      if (whole && c.after == 1.0f) {
        const Packed<T> result = apply_vector<Perturb, T, T, Elementwise>(
            packed[r], philox, static_cast<uint32_t>((window.col_offset + j) / 4), c.scale);
        if (all_finite(result)) {
          store_packed(here + j, result);
          continue;
        }
      }
      const int64_t end = j + kVector < window.cols ? j + kVector : window.cols;
      apply_scalar<Perturb, Elementwise>(here, here, philox, window.col_offset, j, end, c);
    }
  }
}

template <class T>
static void launch_fused(const PerturbMergedArgs& args, int sm_count, cudaStream_t stream) {
  const Window& window = args.perturb.window;
  const int threads = fused_threads(window.cols);
  const int64_t blocks = divide_up(window.rows, kFusedRows);
  const int64_t held = static_cast<int64_t>(sm_count) * (kThreads * kBlocksPerSm / threads);
  const int grid = static_cast<int>(blocks < held ? blocks : held);
  if (args.perturb.elementwise) {
    FLATKERN_LAUNCH((perturb_merged_kernel<T, true>), grid, threads, stream, args);
  } else {
    FLATKERN_LAUNCH((perturb_merged_kernel<T, false>), grid, threads, stream, args);
  }
}

void launch_perturb_merged(const PerturbMergedArgs& args, int sm_count, cudaStream_t stream) {
  const PerturbArgs& perturb = args.perturb;
  if (perturb.window.rows == 0) return;
  const bool aligned = is_vector_aligned(perturb.out, perturb.out_stride, perturb.out_dtype) &&
                       perturb.window.col_offset % 4 == 0;
  if (perturb.window.cols > 0 && fuses(perturb.window.cols, args.row_norm.rank, aligned)) {
    with_type(perturb.out_dtype,
              [&](auto weight) { launch_fused<decltype(weight)>(args, sm_count, stream); });
    return;
  }
  launch_row_norm({args.row_norm}, sm_count, stream);
  launch_perturb({perturb}, sm_count, stream);
}

}  // namespace flatkern::cuda

// Row norms of W + s B A: the merged weight lives in registers only. Shared by the row-norm and
// the fused kernel, which give the same bits: a lane's columns are summed in float32 eight at a
// time, those sums in float64 in column order, the lanes' totals by a fixed tree.
#pragma once

#include <utility>

#include "device.h"

namespace flatkern::cuda {

inline bool is_aligned(const RowNormArgs& args) {
  return is_vector_aligned(args.weight, args.weight_stride, args.weight_dtype);
}

// What tells the kernels of one launcher apart.
inline std::pair<Dtype, bool> row_norm_variant(const RowNormArgs& args) {
  return {args.weight_dtype, is_aligned(args)};
}

// The sum of squares of kVector merged columns of each of Rows rows, from column j on; b(k, r) is
// sB of rank k and row r.
template <int Rows, int Unroll, class T, class F>
FLATKERN_HD void square_sums(const RowNormArgs& args, const Packed<T>* weight, const F& b,
                             int64_t j, float* sums) {
  float merged[Rows][kVector];
#pragma unroll
  for (int r = 0; r < Rows; ++r) to_floats(weight[r], merged[r]);
#pragma unroll Unroll
  for (int k = 0; k < static_cast<int>(args.rank); ++k) {
    float a[kVector];
    to_floats(load_packed(args.lora_A + k * args.lora_A_stride + j), a);
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const float factor = b(k, r);
#pragma unroll
      for (int i = 0; i < kVector; ++i) merged[r][i] = fmaf(factor, a[i], merged[r][i]);
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum = fmaf(merged[r][i], merged[r][i], sum);
    sums[r] = sum;
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

// The sum over the warp, the same tree and so the same bits for every caller.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}

// In float64 throughout, by one warp: for a row whose squares leave the range of float32.
template <class T>
__device__ double row_square_wide(const RowNormArgs& args, int64_t row) {
  const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride;
  double sum = 0.0;
  for (int64_t j = threadIdx.x % kWarp; j < args.cols; j += kWarp) {
    double merged = to_float(weight[j]);
    for (int64_t k = 0; k < args.rank; ++k) {
      const double b = args.lora_B[row * args.rank + k];
      merged += b * args.lora_A[k * args.lora_A_stride + j];
    }
    sum += merged * merged;
  }
  return warp_sum(sum);
}

// From a lane's share of a row's sum to the row's scale, the same in every lane.
template <class T>
__device__ __forceinline__ float finish_row(const RowNormArgs& args, int64_t row, double share) {
  const double total = warp_sum(share);
  // Outside this range a square may have overflowed or lost its bits.
  const bool tame = total > 1e-28 && total < 1e37;
  const float norm = tame ? sqrtf(static_cast<float>(total))
                          : static_cast<float>(sqrt(row_square_wide<T>(args, row)));
  return norm * args.relative_scale;
}

// On tensor cores, for ranks beyond kDirectRank.
void launch_row_norm_mma(const std::vector<RowNormArgs>& tensors, int sm_count,
                         cudaStream_t stream);

}  // namespace flatkern::cuda

// What kernels and their launchers share.
#pragma once

#include "kernels.h"
#include "launch.h"
#include "noise.h"
#include "packed.h"

namespace flatkern::cuda {

// The unit of the calling warp in a tensor's thread block number `number`.
__device__ __forceinline__ Unit unit_of_warp(const Block& block, int log2, uint32_t number) {
  return unit_of(block.rows, block.cols, log2,
                 static_cast<uint64_t>(number) * kWarpsPerBlock + threadIdx.x / kWarp);
}

// Whether rows can be read and written kVector elements at a time.
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
inline bool is_vector_aligned(const void* base, int64_t stride, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

// The storage type of a dtype, passed to a generic callable.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat16:
      return f(Float16{});
  }
}

}  // namespace flatkern::cuda

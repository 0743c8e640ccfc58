// Matrix products on bfloat16 tensor cores, and what takes float32 there.
#pragma once

#include "device.h"

namespace flatkern::cuda {

// c += A B for A of 16 x 16 and B of 16 x 8 bfloat16, by one warp ("Matrix Fragments for
// mma.m16n8k16" in the PTX ISA). With g = lane / 4 and t = lane % 4, a lane holds two values a
// word: of A rows g, g + 8, g, g + 8 at columns 2t, 2t + 1, the last two words at 8 more; of B
// column g at rows 2t, 2t + 1 and at 8 more; of C rows g, g, g + 8, g + 8 at columns 2t, 2t + 1.
__device__ __forceinline__ void mma(float* c, const uint32_t* a, const uint32_t* b) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(FLATKERN_EMULATE)
  emulator::mma_m16n8k16_bf16(c, a, b);
#endif
}

// Two values, each as three bfloat16 that hold all of its 24 bits: every rest is exact. Values
// below 2^-110 keep fewer, and those that round to infinity become NaN.
FLATKERN_HD void split_pair(float x, float y, uint32_t& high, uint32_t& middle, uint32_t& low) {
  float a, b;
  high = pack(BFloat16{}, x, y);
  unpack(BFloat16{}, high, a, b);
  x -= a, y -= b;
  middle = pack(BFloat16{}, x, y);
  unpack(BFloat16{}, middle, a, b);
  low = pack(BFloat16{}, x - a, y - b);
}

}  // namespace flatkern::cuda

// Fields of the residual: W's index in its range, in as many bits as the range needs. Four fields
// are at most 32 bits, and handled as one word.
#pragma once

#include "bracket.h"

namespace flatkern::cuda {

constexpr int kQuads = kVector / 4;

// Bits that hold a number up to span.
FLATKERN_HD uint32_t width_of(uint32_t span) {
#ifdef __CUDA_ARCH__
  uint32_t highest;  // 2^32 - 1 where there is none
  asm("bfind.u32 %0, %1;" : "=r"(highest) : "r"(span));
  return highest + 1u;
#else
  return span == 0 ? 0 : 32 - __builtin_clz(span);
#endif
}

// Zeros above the highest bit of what is not 0.
FLATKERN_HD uint32_t leading_zeros(uint32_t bits) {
#ifdef __CUDA_ARCH__
  uint32_t zeros;
  asm("bfind.shiftamt.u32 %0, %1;" : "=r"(zeros) : "r"(bits));
  return zeros;
#else
  return __builtin_clz(bits);
#endif
}

// Widths of a vector's fields: of float32 as they are, of 16-bit dtypes as what is left of 16.
template <class T>
struct Widths {
  uint32_t of[kVector];

  // Bits of four fields.
  FLATKERN_HD uint32_t bits(int quad) const {
    const uint32_t* w = of + 4 * quad;
    const uint32_t sum = w[0] + w[1] + w[2] + w[3];
    return sizeof(T) == 4 ? sum : 64u - sum;
  }

  // Four fields end to end, low bit first, from where their ranges have them.
  FLATKERN_HD uint32_t join(const uint32_t* fields, int quad) const {
    const uint32_t* w = of + 4 * quad;
    if constexpr (sizeof(T) == 4) {
      fields += 4 * quad;
      const uint32_t two = fields[0] | fields[1] << w[0], others = fields[2] | fields[3] << w[2];
      return two | others << (w[0] + w[1]);
    } else {
      // The second of a pair goes down until it meets the first, of which nothing is left then.
      fields += 2 * quad;
      const uint32_t two = (fields[0] & 0xFFFFu) | fields[0] >> w[0];
      const uint32_t others = (fields[1] & 0xFFFFu) | fields[1] >> w[2];
      return two | others << (32u - w[0] - w[1]);
    }
  }

  // Adds four fields, which `joined` begins with, to their bases.
  FLATKERN_HD void add(uint32_t joined, int quad, uint32_t* base) const {
    const uint32_t* w = of + 4 * quad;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        base[4 * quad + i] += joined & ((1u << w[i]) - 1u);
        joined >>= w[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t first = w[2 * i], second = w[2 * i + 1];
        base[2 * quad + i] += (joined & (0xFFFFu >> first)) +
                              ((joined << first) & (0xFFFF0000u >> second) & 0xFFFF0000u);
        joined >>= 32u - first - second;
      }
    }
  }
};

template <class T>
FLATKERN_HD Widths<T> widths_of(const Ranges<T>& ranges) {
  Widths<T> widths;
#pragma unroll
  for (int i = 0; i < Ranges<T>::kWords; ++i) {
    const uint32_t span = ranges.word[i].span;
    if constexpr (sizeof(T) == 4) {
      widths.of[i] = width_of(span);
    } else {
      // At most 16, of an empty half: the bit below the half is set.
      widths.of[2 * i] = leading_zeros((span << 16) + 0x8000u);
      widths.of[2 * i + 1] = leading_zeros(span | 0x8000u);
    }
  }
  return widths;
}

// Bits shift .. shift + 31 of two words; shift is at most 32.
FLATKERN_HD uint32_t funnel(uint32_t low, uint32_t high, uint32_t shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_rc(low, high, shift);
#else
  return static_cast<uint32_t>((low | static_cast<uint64_t>(high) << 32) >> shift);
#endif
}

}  // namespace flatkern::cuda

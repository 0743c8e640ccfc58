// Where W must be, given S and the noise, one element at a time: what cpu/bracket.h does with
// vectors. Compiled with -fmad=false; every float operation rounds once, none flushes denormals.
#pragma once

#include "../residual.h"
#include "device.h"

namespace flatkern::cuda {

// The codes base .. base + span, sign included, among which W must be; 0, 0 if too many.
struct Bracket {
  uint32_t base, span;
};

// 2^E, E the exponent of s but at least the dtype's smallest.
template <class T>
FLATKERN_HD uint32_t exponent_of(float s) {
  const uint32_t exponent = bits_of_float(s) & 0x7F800000u;
  return exponent > Precision<T>::kMinExponent ? exponent : Precision<T>::kMinExponent;
}

// Codes of two float32 magnitudes rounded towards zero, the first in the low half.
FLATKERN_HD uint32_t truncate(BFloat16, uint32_t first, uint32_t second) {
#ifdef __CUDA_ARCH__
  return __byte_perm(first, second, 0x7632);
#else
  return first >> 16 | (second & 0xFFFF0000u);
#endif
}
FLATKERN_HD uint32_t truncate(Float16, uint32_t first, uint32_t second) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  asm("cvt.rz.f16x2.f32 %0, %1, %2;"
      : "=r"(packed)
      : "f"(float_of_bits(second)), "f"(float_of_bits(first)));
  return packed;
#else
  const auto one = [](uint32_t code) -> uint32_t {
    if (code >= 0x7F800000u) return 0x7C00u;
    if (code >= 0x47800000u) return 0x7BFFu;
    // Below the smallest normal number, 2^-14, codes count steps of 2^-24.
    if (code < 0x38800000u) return static_cast<uint32_t>(float_of_bits(code) * 0x1p24f);
    return (code - 0x38000000u) >> 13;
  };
  return one(first & 0x7FFFFFFFu) | one(second & 0x7FFFFFFFu) << 16;
#endif
}

// Correctly rounded; the argument is above 1/16.
FLATKERN_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(x);
#else
  return 1.0f / x;
#endif
}

// Ranges that reach zero or hold more than 256 codes become 0, 0.
FLATKERN_HD Bracket narrow(bool possible, uint32_t base, uint32_t top, uint32_t sign) {
  const uint32_t span = top - base;
  return possible && span < 256u ? Bracket{base | sign, span} : Bracket{0, 0};
}

// A 16-bit dtype; s is S and e the noise, or its factor of |W|.
template <class T, bool Elementwise>
FLATKERN_HD Bracket bracket(T dtype, float s, float e) {
  constexpr uint32_t kBits = Precision<T>::kBits;
  // Half a gap of S and two float32 ulps; elementwise rounds twice more.
  constexpr uint32_t kSlack = 1u << (kBits + 1 + Elementwise);
  float half = float_of_bits(exponent_of<T>(s) - (kBits << 23) + kSlack);
  bool possible = true;
  float size, sign;
  if constexpr (Elementwise) {
    const float factor = 1.0f + float_of_bits(bits_of_float(e) ^ (bits_of_float(s) & 0x80000000u));
    const float inverse = reciprocal(factor);
    possible = factor > 0.0625f;
    size = fabsf(s) * inverse;
    half = half * inverse;
    sign = s;
  } else {
    sign = s - e;
    size = fabsf(sign);
  }
  const float low = size - half, high = size + half;
  const uint32_t codes = truncate(dtype, bits_of_float(low) - 1u, bits_of_float(high));
  return narrow(possible && low > 0.0f, (codes & 0xFFFFu) + 1u, codes >> 16,
                bits_of_float(sign) >> 16 & 0x8000u);
}

// float32 has no spare bits: the exact error of S - e, and the tie rule. Never elementwise.
template <class T, bool Elementwise>
FLATKERN_HD Bracket bracket(float, float s, float e) {
  const float before = s - e;
  const uint32_t sign = bits_of_float(before) & 0x80000000u;
  const float error = float_of_bits(bits_of_float((s - before) - e) ^ sign);
  const float size = fabsf(before), half = float_of_bits(exponent_of<float>(s) - (24u << 23));
  const bool odd = bits_of_float(s) & 1u;
  const float down = error - half, up = error + half;
  const float low = size + down, high = size + up;
  const float below = down - (low - size), above = up - (high - size);
  const uint32_t base = bits_of_float(low) + (below > 0.0f || (below == 0.0f && odd));
  const uint32_t top = bits_of_float(high) - (above < 0.0f || (above == 0.0f && odd));
  return narrow(low > 0.0f, base, top, sign);
}

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

// S - e rounded half-up, in code space, to a multiple of 2^grid.
FLATKERN_HD uint32_t round_to_grid(float s, float e, uint32_t grid) {
  const float before = s - e;
  const uint32_t code = bits_of_float(before) + (1u << (grid - 1));
  return before == 0.0f ? 0u : code >> grid << grid;
}

}  // namespace flatkern::cuda

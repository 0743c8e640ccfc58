// Where W must be, given S and the noise: what cpu/bracket.h does with vectors. Compiled with
// -fmad=false; every float operation rounds once, none flushes denormals.
//
// Codes of 16 bits are handled two to a word as they lie in memory, the first in the low half: what
// most elements need takes half the instructions so, and what few need stands behind a branch.
#pragma once

#include "../residual.h"
#include "device.h"

namespace flatkern::cuda {

// A one in each half; the sign of each; where a number below 256 has nothing.
constexpr uint32_t kOnes = 0x00010001u, kSigns = 0x80008000u, kBeyondByte = 0xFF00FF00u;

// The codes base .. base + span, sign included, among which W must be; 0, 0 if too many. Of one
// float32, or the two halves of a pair.
struct Bracket {
  uint32_t base, span;
};

FLATKERN_HD uint32_t pair_of(uint32_t low, uint32_t high) { return low | high << 16; }
// The high halves of two words.
FLATKERN_HD uint32_t high_halves(uint32_t first, uint32_t second) {
#ifdef __CUDA_ARCH__
  return __byte_perm(first, second, 0x7632);
#else
  return first >> 16 | (second & 0xFFFF0000u);
#endif
}

// The NaN that a device's sums and products give, whatever their operands hold.
FLATKERN_HD uint32_t device_bits(float value) {
#ifndef __CUDA_ARCH__
  if (is_nan(value)) return 0x7FFFFFFFu;
#endif
  return bits_of_float(value);
}

// 2^E + addend as bits, E the exponent of s but at least the dtype's smallest.
template <class T>
FLATKERN_HD float exponent_plus(float s, int32_t addend) {
  const int32_t exponent = static_cast<int32_t>(bits_of_float(s) & 0x7F800000u);
  const int32_t least = static_cast<int32_t>(Precision<T>::kMinExponent) + addend;
#ifdef __CUDA_ARCH__
  return float_of_bits(__viaddmax_s32(exponent, addend, least));
#else
  return float_of_bits(exponent + addend > least ? exponent + addend : least);
#endif
}

// Codes of two float32 rounded towards zero, with their signs; NaN has all bits but the sign.
FLATKERN_HD uint32_t truncate(BFloat16, uint32_t first, uint32_t second) {
  return high_halves(first, second);
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
    const uint32_t magnitude = code & 0x7FFFFFFFu, sign = code >> 16 & 0x8000u;
    if (magnitude > 0x7F800000u) return 0x7FFFu;
    if (magnitude == 0x7F800000u) return sign | 0x7C00u;
    if (magnitude >= 0x47800000u) return sign | 0x7BFFu;
    // Below the smallest normal number, 2^-14, codes count steps of 2^-24.
    if (magnitude < 0x38800000u) {
      return sign | static_cast<uint32_t>(float_of_bits(magnitude) * 0x1p24f);
    }
    return sign | (magnitude - 0x38000000u) >> 13;
  };
  return pair_of(one(first), one(second));
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

// The ends of a 16-bit element's range as bits of float32, and bits with W's sign; s is S and e the
// noise, or its factor of |W|.
struct Ends {
  uint32_t low, high, sign;
};
template <class T, bool Elementwise>
FLATKERN_HD Ends ends_of(float s, float e) {
  constexpr int32_t kBits = Precision<T>::kBits;
  // Half a gap of S and two float32 ulps; elementwise rounds twice more.
  constexpr int32_t kSlack = 1 << (kBits + 1 + Elementwise);
  float half = exponent_plus<T>(s, kSlack - (kBits << 23));
  if constexpr (Elementwise) {
    const float factor = 1.0f + float_of_bits(bits_of_float(e) ^ (bits_of_float(s) & 0x80000000u));
    const float inverse = fabsf(reciprocal(factor)), size = fabsf(s) * inverse;
    half = half * inverse;
    // From -1 to a positive end: too wide.
    const float low = factor > 0.0625f ? size - half : -1.0f;
    return {device_bits(low), device_bits(size + half), bits_of_float(s)};
  } else {
    const float before = s - e, size = fabsf(before);
    return {device_bits(size - half), device_bits(size + half), bits_of_float(before)};
  }
}

// Empties the halves that reach zero or hold more than 256 codes, and mends what these carried
// into the other half; `below` is what precedes the base, `top` the last code.
FLATKERN_HD void drop_wide(uint32_t below, uint32_t top, Bracket& pair) {
  const uint32_t first = (top & 0xFFFFu) - (below & 0xFFFFu) - 1u;
  const uint32_t second = (top >> 16) - (below >> 16) - 1u;
  const uint32_t keep = (first < 256u ? 0xFFFFu : 0u) | (second < 256u ? 0xFFFF0000u : 0u);
  const uint32_t base = pair_of((below + 1u) & 0xFFFFu, (below >> 16) + 1u);
  pair.base = (base | (pair.base & kSigns)) & keep;
  pair.span = pair_of(first & 0xFFFFu, second) & keep;
}

// float32 has no spare bits: the exact error of S - e, and the tie rule. Never elementwise.
FLATKERN_HD Bracket bracket_of(float s, float e) {
  const float before = s - e;
  const uint32_t sign = bits_of_float(before) & 0x80000000u;
  const float error = float_of_bits(bits_of_float((s - before) - e) ^ sign);
  const float size = fabsf(before), half = exponent_plus<float>(s, -(24 << 23));
  const bool odd = bits_of_float(s) & 1u;
  const float down = error - half, up = error + half;
  const float low = size + down, high = size + up;
  const float below = down - (low - size), above = up - (high - size);
  const uint32_t base = bits_of_float(low) + (below > 0.0f || (below == 0.0f && odd));
  const uint32_t top = bits_of_float(high) - (above < 0.0f || (above == 0.0f && odd));
  const uint32_t span = top - base;
  return low > 0.0f && span < 256u ? Bracket{base | sign, span} : Bracket{0, 0};
}

// The ranges of a vector: a word has one float32 or a pair.
template <class T>
struct Ranges {
  static constexpr int kWords = kVector * sizeof(T) / 4;
  Bracket word[kWords];
};

template <class T, bool Elementwise>
FLATKERN_HD Ranges<T> ranges_of(const Packed<T>& noisy, const float* e) {
  float s[kVector];
  to_floats(noisy, s);
  Ranges<T> found;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) found.word[i] = bracket_of(s[i], e[i]);
  } else {
    uint32_t below[kVector / 2], top[kVector / 2], spans = 0;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const Ends first = ends_of<T, Elementwise>(s[2 * i], e[2 * i]);
      const Ends second = ends_of<T, Elementwise>(s[2 * i + 1], e[2 * i + 1]);
      // A low end that is not above 0 leaves a code behind all tops: its span is not small.
      below[i] = truncate(T{}, first.low - 1u, second.low - 1u);
      top[i] = truncate(T{}, first.high, second.high);
      found.word[i] = {(below[i] + kOnes) | (high_halves(first.sign, second.sign) & kSigns),
                       top[i] - below[i] - kOnes};
      spans |= found.word[i].span;
    }
    if ((spans & kBeyondByte) != 0) {
#pragma unroll
      for (int i = 0; i < kVector / 2; ++i) drop_wide(below[i], top[i], found.word[i]);
    }
  }
  return found;
}

// S - e rounded half-up, in code space, to a multiple of 2^grid.
FLATKERN_HD uint32_t round_to_grid(float s, float e, uint32_t grid) {
  const float before = s - e;
  const uint32_t code = bits_of_float(before) + (1u << (grid - 1));
  return before == 0.0f ? 0u : code >> grid << grid;
}

}  // namespace flatkern::cuda

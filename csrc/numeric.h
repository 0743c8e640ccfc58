// One element: dtype <-> float32, rounding to nearest even, perturb and restore; host and device.
//
// These functions are the meaning of every kernel's inner line. Vector loops may take another
// route to the same bits, and fall back to these where an element is not finite.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "philox.h"

namespace flatkern {

enum class Dtype : uint8_t { kFloat32, kBFloat16, kFloat16 };

// Storage types: the bits of a 16-bit float, told apart by type.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FLATKERN_HD float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FLATKERN_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
// Comparisons with bits, not isfinite(): no compiler flag and no flush-to-zero mode changes them.
FLATKERN_HD bool is_finite(float value) {
  return (bits_of_float(value) & 0x7F800000u) != 0x7F800000u;
}
FLATKERN_HD bool is_nan(float value) { return (bits_of_float(value) & 0x7FFFFFFFu) > 0x7F800000u; }

FLATKERN_HD float to_float(float value) { return value; }
FLATKERN_HD float to_float(BFloat16 value) {
  return float_of_bits(static_cast<uint32_t>(value.bits) << 16);
}
FLATKERN_HD float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of_bits(sign | (magnitude << 13) | 0x7F800000u);
  if (magnitude >= 0x0400u) return float_of_bits(sign | ((magnitude << 13) + 0x38000000u));
  const float denormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of_bits(sign | bits_of_float(denormal));
#endif
}

template <class T>
FLATKERN_HD T round_to(float value);

template <>
FLATKERN_HD float round_to<float>(float value) {
  return value;
}
template <>
FLATKERN_HD BFloat16 round_to<BFloat16>(float value) {
  const uint32_t bits = bits_of_float(value);
  if (is_nan(value)) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
FLATKERN_HD Float16 round_to<Float16>(float value) {
#ifdef __CUDA_ARCH__
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  } else if (magnitude >= 0x477FF000u) {  // 65520, the first to round to infinity
    half = 0x7C00u;
  } else if (magnitude >= 0x38800000u) {  // normal
    half = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  } else if (magnitude > 0x33000000u) {               // above half of the smallest denormal, 2^-25
    const uint32_t shift = 126u - (magnitude >> 23);  // 14..24 bits to drop
    const uint32_t mantissa = (magnitude & 0x007FFFFFu) | 0x00800000u;
    half = (mantissa + (1u << (shift - 1)) - 1u + ((mantissa >> shift) & 1u)) >> shift;
  } else {
    half = 0;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

// A non-finite scale counts as 0.
FLATKERN_HD float usable_scale(float c) { return is_finite(c) ? c : 0.0f; }

// What perturb rounds: w + e with e = c z (|w|) rounded before it is added. Compiled without
// contraction, so that no FMA joins product and sum.
FLATKERN_HD float perturbed_value(float w, float c, float z, bool elementwise) {
  const float e = c * z;
  return w + (elementwise ? e * fabsf(w) : e);
}

// What restore rounds: s - e, or s / (1 + c z sign(s)).
FLATKERN_HD float restored_value(float s, float c, float z, bool elementwise) {
  const float e = c * z;
  if (!elementwise) return s - e;
  const float sign = s > 0.0f ? 1.0f : (s < 0.0f ? -1.0f : 0.0f);
  const float factor = 1.0f + e * sign;
  // Noise that took (nearly) all of an element, or flipped its sign, cannot be divided out.
#ifdef __CUDA_ARCH__
  // Within 2 ulps, where an exact division would be a call with spills; restore is lossy anyway.
  const float quotient = __fdividef(s, factor);
#else
  const float quotient = s / factor;
#endif
  return factor > 0.0625f ? quotient : s;
}

// One rounding to the result's dtype. An element that is not finite, or would not stay finite,
// is left as it is: to the bit where the dtype is kept.
template <class Dst, class Src>
FLATKERN_HD Dst keep_finite(Src before, float value) {
  const Dst after = round_to<Dst>(value);
  if (is_finite(to_float(after))) return after;
  if constexpr (std::is_same_v<Dst, Src>) return before;
  return round_to<Dst>(to_float(before));
}

}  // namespace flatkern

// kVector elements at a time: loads and stores of 128 bits, widening, sums and rounding.
#pragma once

#include "../numeric.h"
#include "launch.h"
#include "runtime.h"

namespace flatkern::cuda {

struct alignas(16) Bits128 {
  uint32_t w[4];
};

// A pointer into global memory that came from integer arithmetic: as such it is loaded from.
template <class T>
FLATKERN_HD T* global_pointer(uint64_t address) {
#ifdef __CUDA_ARCH__
  return static_cast<T*>(__cvta_global_to_generic(address));
#else
  return reinterpret_cast<T*>(address);
#endif
}

// Spelled out, because a store under a condition is otherwise split into 32-bit ones.
FLATKERN_HD void store_bits(void* p, const Bits128& bits) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(bits.w[0]), "r"(bits.w[1]),
               "r"(bits.w[2]), "r"(bits.w[3])
               : "memory");
#else
  *static_cast<Bits128*>(p) = bits;
#endif
}

// Two floats rounded to nearest even and packed, the first in the low half.
FLATKERN_HD uint32_t pack(BFloat16, float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
#else
  return round_to<BFloat16>(first).bits | uint32_t{round_to<BFloat16>(second).bits} << 16;
#endif
}
FLATKERN_HD uint32_t pack(Float16, float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
#else
  return round_to<Float16>(first).bits | uint32_t{round_to<Float16>(second).bits} << 16;
#endif
}

FLATKERN_HD void unpack(BFloat16, uint32_t packed, float& first, float& second) {
  first = float_of_bits(packed << 16);
  second = float_of_bits(packed & 0xFFFF0000u);
}
FLATKERN_HD void unpack(Float16, uint32_t packed, float& first, float& second) {
#ifdef __CUDA_ARCH__
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2;\n\t"
      "cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(first), "=f"(second)
      : "r"(packed));
#else
  first = to_float(Float16{static_cast<uint16_t>(packed)});
  second = to_float(Float16{static_cast<uint16_t>(packed >> 16)});
#endif
}

// Two elements in float32, each plus its `e`.
template <class T>
FLATKERN_HD void widen_add(T, uint32_t packed, const float* e, float* sum) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define FLATKERN_ADD(TYPE)                                             \
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2;\n\t"            \
      "add.f32." TYPE " %0, low, %3; add.f32." TYPE " %1, high, %4; }" \
      : "=f"(sum[0]), "=f"(sum[1])                                     \
      : "r"(packed), "f"(e[0]), "f"(e[1]))
  if constexpr (std::is_same_v<T, BFloat16>) {
    FLATKERN_ADD("bf16");
  } else {
    FLATKERN_ADD("f16");
  }
#undef FLATKERN_ADD
#else
  unpack(T{}, packed, sum[0], sum[1]);
  sum[0] += e[0];
  sum[1] += e[1];
#endif
}

// kVector adjacent elements as they lie in memory.
template <class T>
struct Packed {
  static constexpr int kWords = kVector * sizeof(T) / 16;
  Bits128 bits[kWords];
};

template <class T>
FLATKERN_HD Packed<T> load_packed(const T* p) {
  Packed<T> packed;
  for (int i = 0; i < Packed<T>::kWords; ++i) {
    packed.bits[i] = reinterpret_cast<const Bits128*>(p)[i];
  }
  return packed;
}
template <class T>
FLATKERN_HD void store_packed(T* p, const Packed<T>& packed) {
  for (int i = 0; i < Packed<T>::kWords; ++i) {
    store_bits(reinterpret_cast<Bits128*>(p) + i, packed.bits[i]);
  }
}

template <class T>
FLATKERN_HD void to_floats(const Packed<T>& packed, float* values) {
  for (int i = 0; i < kVector / 2; ++i) {
    unpack(T{}, packed.bits[0].w[i], values[2 * i], values[2 * i + 1]);
  }
}
FLATKERN_HD void to_floats(const Packed<float>& packed, float* values) {
  for (int i = 0; i < kVector; ++i) values[i] = float_of_bits(packed.bits[i / 4].w[i % 4]);
}

// The vector in float32, each element plus its `e`.
template <class T>
FLATKERN_HD void add_to(const Packed<T>& packed, const float* e, float* sums) {
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < kVector; ++i) sums[i] = float_of_bits(packed.bits[i / 4].w[i % 4]) + e[i];
  } else {
    for (int i = 0; i < kVector; i += 2) widen_add(T{}, packed.bits[0].w[i / 2], e + i, sums + i);
  }
}

template <class T>
FLATKERN_HD Packed<T> round_packed(const float* values) {
  Packed<T> packed;
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < kVector; ++i) packed.bits[i / 4].w[i % 4] = bits_of_float(values[i]);
  } else {
    for (int i = 0; i < kVector / 2; ++i) {
      packed.bits[0].w[i] = pack(T{}, values[2 * i], values[2 * i + 1]);
    }
  }
  return packed;
}

#ifndef __CUDA_ARCH__
template <class T>
uint32_t multiply_add_halves(uint32_t x, uint32_t y, uint32_t sum) {
  float a[2], b[2], c[2];
  unpack(T{}, x, a[0], a[1]);
  unpack(T{}, y, b[0], b[1]);
  unpack(T{}, sum, c[0], c[1]);
  return pack(T{}, fmaf(a[0], b[0], c[0]), fmaf(a[1], b[1], c[1]));
}
#endif

// x y + sum, two at a time.
FLATKERN_HD uint32_t multiply_add(BFloat16, uint32_t x, uint32_t y, uint32_t sum) {
#ifdef __CUDA_ARCH__
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(y));
  return sum;
#else
  return multiply_add_halves<BFloat16>(x, y, sum);
#endif
}
FLATKERN_HD uint32_t multiply_add(Float16, uint32_t x, uint32_t y, uint32_t sum) {
#ifdef __CUDA_ARCH__
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(y));
  return sum;
#else
  return multiply_add_halves<Float16>(x, y, sum);
#endif
}

// False where an element is not finite, and where a product of two 16-bit ones overflows: what is
// false takes longer, to the same end.
template <class T>
FLATKERN_HD bool all_finite(const Packed<T>& packed) {
  if constexpr (sizeof(T) == 4) {
    float sum = 0.0f;
    for (int i = 0; i < kVector; ++i) {
      sum = fmaf(float_of_bits(packed.bits[i / 4].w[i % 4]), 0.0f, sum);
    }
    return sum == 0.0f;
  } else {
    // Infinities and NaN stay what they are in a product and a sum, or turn into NaN.
    const uint32_t* words = packed.bits[0].w;
    const uint32_t three = multiply_add(T{}, words[0], words[1], words[2]);
    const uint32_t four = multiply_add(T{}, three, 0, words[3]);
    return multiply_add(T{}, four, 0, 0) == 0;
  }
}

}  // namespace flatkern::cuda

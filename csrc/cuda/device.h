// What the kernels share on the device: keys, normals, packed loads and stores. Everything also
// compiles for the host, where tests run the kernels' own source.
#pragma once

#include "kernels.h"
#include "launch.h"

namespace flatkern::cuda {

FLATKERN_HD NoiseKey load_key(const int64_t* key) {
  return {static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[1]),
          static_cast<uint32_t>(key[2]), static_cast<uint32_t>(key[3])};
}

// The hardware's log2, square root, sine and cosine; none of their arguments here is denormal.
FLATKERN_HD float fast_log2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}
FLATKERN_HD float fast_sqrt(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return sqrtf(x);
#endif
}
FLATKERN_HD float fast_sin(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return sinf(x);
#endif
}
FLATKERN_HD float fast_cos(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return cosf(x);
#endif
}

// Two floats; one instruction an operation from sm_100 on, each lane rounded by itself as ever.
struct Pair {
  float first, second;
};
FLATKERN_HD Pair operator*(Pair a, Pair b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  Pair product;
  asm("{ .reg .b64 a, b; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5};\n\t"
      "mul.rn.f32x2 a, a, b; mov.b64 {%0, %1}, a; }"
      : "=f"(product.first), "=f"(product.second)
      : "f"(a.first), "f"(a.second), "f"(b.first), "f"(b.second));
  return product;
#else
  return {a.first * b.first, a.second * b.second};
#endif
}
// radius_uniform of two words.
FLATKERN_HD Pair radius_uniforms(uint32_t first, uint32_t second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  Pair u = {static_cast<float>(first), static_cast<float>(second)};
  asm("{ .reg .b64 a, b, c; mov.b64 a, {%0, %1}; mov.b64 b, {%2, %2}; mov.b64 c, {%3, %3};\n\t"
      "fma.rn.f32x2 a, a, b, c; mov.b64 {%0, %1}, a; }"
      : "+f"(u.first), "+f"(u.second)
      : "f"(0x1p-32f), "f"(0x1p-33f));
  return u;
#else
  return {radius_uniform(first), radius_uniform(second)};
#endif
}

// sqrt(2 ln 2): what turns the root of |log2 u| into a radius. Multiplied into c once a row.
constexpr float kRadiusOfRoot = 1.17741002252f;

// c z of the four columns of a group, from c times kRadiusOfRoot.
FLATKERN_HD void scaled_group(const PhiloxRow& row, uint32_t group, float scale, float* e) {
  constexpr float kAngle = 3.14159265359f * 0x1p-31f;
  const Words words = philox_group(row, group);
  const Pair u = radius_uniforms(words.w[0], words.w[2]);
  // |log2|: the hardware may give a few ulps above 0 at u = 1.
  const Pair root = {fast_sqrt(fabsf(fast_log2(u.first))), fast_sqrt(fabsf(fast_log2(u.second)))};
  const Pair radius = Pair{scale, scale} * root;
  const Pair angle = Pair{static_cast<float>(static_cast<int32_t>(words.w[1])),
                          static_cast<float>(static_cast<int32_t>(words.w[3]))} *
                     Pair{kAngle, kAngle};
  const Pair even = radius * Pair{fast_cos(angle.first), fast_cos(angle.second)};
  const Pair odd = radius * Pair{fast_sin(angle.first), fast_sin(angle.second)};
  e[0] = even.first, e[1] = odd.first, e[2] = even.second, e[3] = odd.second;
}

// A row's c, times kRadiusOfRoot; `after` is 1 but for c so large or small that a radius, below
// 6.77 c, might overflow or lose bits: then c is shifted first, and e is shifted back.
struct RowScale {
  float scale, after;
};
FLATKERN_HD RowScale row_scale_of(float c) {
  c = usable_scale(c);
  const float size = fabsf(c);
  if (size >= 0x1p125f) return {c * 0x1p-8f * kRadiusOfRoot, 0x1p8f};
  if (size < 0x1p-100f && size > 0.0f) return {c * 0x1p64f * kRadiusOfRoot, 0x1p-64f};
  return {c * kRadiusOfRoot, 1.0f};
}

// A warp's walk over work units: row `row`, columns from `begin`; every `warps`-th unit is its own.
// Divides once, in 32 bits: a 64-bit division is a call, around which registers spill.
struct UnitWalk {
  int64_t row, rows;
  uint32_t segment, per_row, row_step, segment_step;

  FLATKERN_HD UnitWalk(const Window& window, uint32_t first, uint32_t warps)
      : rows(window.rows), per_row(static_cast<uint32_t>(units_per_row(window.cols))) {
    row = first / per_row;
    segment = first % per_row;
    row_step = warps / per_row;
    segment_step = warps % per_row;
  }
  FLATKERN_HD bool inside() const { return row < rows; }
  FLATKERN_HD int64_t begin() const { return static_cast<int64_t>(segment) * kUnitCols; }
  FLATKERN_HD int64_t end(int64_t cols) const {
    return begin() + kUnitCols < cols ? begin() + kUnitCols : cols;
  }
  FLATKERN_HD void next() {
    row += row_step;
    segment += segment_step;
    if (segment >= per_row) {
      segment -= per_row;
      ++row;
    }
  }
};

// The units of the calling warp, where this is one of `blocks` blocks.
__device__ __forceinline__ UnitWalk walk_of_warp(const Window& window, uint32_t block = blockIdx.x,
                                                 uint32_t blocks = gridDim.x) {
  return {window, block * kWarpsPerBlock + threadIdx.x / kWarp, blocks * kWarpsPerBlock};
}

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

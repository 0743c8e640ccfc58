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

// sqrt(2 ln 2): what turns the root of |log2 u| into a radius. Multiplied into c once a row.
constexpr float kRadiusOfRoot = 1.17741002252f;

// c z of a pair of columns, from c times kRadiusOfRoot.
FLATKERN_HD void scaled_pair(uint32_t a, uint32_t b, float scale, float& even, float& odd) {
  // |log2|: the hardware may give a few ulps above 0 at u = 1.
  const float radius = scale * fast_sqrt(fabsf(fast_log2(radius_uniform(a))));
  const float angle = static_cast<float>(static_cast<int32_t>(b)) * (3.14159265359f * 0x1p-31f);
  even = radius * fast_cos(angle);
  odd = radius * fast_sin(angle);
}

// c z of the four columns of a group.
FLATKERN_HD void scaled_group(const PhiloxRow& row, uint32_t group, float scale, float* e) {
  const Words words = philox_group(row, group);
  scaled_pair(words.w[0], words.w[1], scale, e[0], e[1]);
  scaled_pair(words.w[2], words.w[3], scale, e[2], e[3]);
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

// x 0 + sum, two at a time: 0 while everything is finite, NaN from then on.
FLATKERN_HD uint32_t times_zero_plus(BFloat16, uint32_t x, uint32_t sum) {
#ifdef __CUDA_ARCH__
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(0u));
  return sum;
#else
  const auto infinite = [](uint32_t half) { return (half & 0x7F80u) == 0x7F80u; };
  return sum | (infinite(x) ? 0x7FFFu : 0u) | (infinite(x >> 16) ? 0x7FFF0000u : 0u);
#endif
}
FLATKERN_HD uint32_t times_zero_plus(Float16, uint32_t x, uint32_t sum) {
#ifdef __CUDA_ARCH__
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(0u));
  return sum;
#else
  const auto infinite = [](uint32_t half) { return (half & 0x7C00u) == 0x7C00u; };
  return sum | (infinite(x) ? 0x7FFFu : 0u) | (infinite(x >> 16) ? 0x7FFF0000u : 0u);
#endif
}

template <class T>
FLATKERN_HD bool all_finite(const Packed<T>& packed) {
  if constexpr (sizeof(T) == 4) {
    float sum = 0.0f;
    for (int i = 0; i < kVector; ++i) {
      sum = fmaf(float_of_bits(packed.bits[i / 4].w[i % 4]), 0.0f, sum);
    }
    return sum == 0.0f;
  } else {
    uint32_t sum = 0;
    for (int i = 0; i < kVector / 2; ++i) sum = times_zero_plus(T{}, packed.bits[0].w[i], sum);
    return sum == 0;
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

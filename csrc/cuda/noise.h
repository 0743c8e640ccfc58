// The noise on the device: keys, normals from Philox's words and the hardware's functions, row
// scales. Everything also compiles for the host, where tests run the kernels' own source.
#pragma once

#include "../numeric.h"

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

}  // namespace flatkern::cuda

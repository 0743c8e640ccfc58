// The counter layout of the noise, Philox4x32 and the uniforms behind Box-Muller; host and device.
//
// Key words are (seed, step), counter words (row, col / 4, tensor, draw), from global coordinates;
// output word k belongs to column 4 * (col / 4) + k. Nothing else enters.
// Generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FLATKERN_HD __host__ __device__ __forceinline__
#else
#define FLATKERN_HD inline __attribute__((always_inline))
#endif

namespace flatkern {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Keeps device compilers from computing a value again inside a loop.
FLATKERN_HD void opaque(uint32_t& value) {
#ifdef __CUDA_ARCH__
  asm("" : "+r"(value));
#else
  (void)value;
#endif
}
FLATKERN_HD void opaque(uint64_t& value) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(value));
#else
  (void)value;
#endif
}

// Raised whenever a bit of any kernel's noise changes: a residual is restored by the noise that
// filled it. NOISE_VERSION in flatkern/_version.py is the same.
constexpr int kNoiseVersion = 1;

struct NoiseKey {
  uint32_t seed, step, draw, tensor;
};

struct Words {
  uint32_t w[4];
};

FLATKERN_HD uint32_t high(uint64_t product) { return static_cast<uint32_t>(product >> 32); }
FLATKERN_HD uint32_t low(uint64_t product) { return static_cast<uint32_t>(product); }

// A 64-bit product, not a high and a low one: one wide multiply on GPUs.
FLATKERN_HD uint64_t product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t p;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  return p;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

FLATKERN_HD Words philox_round(const Words& c, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = product(c.w[0], kPhiloxM0), p1 = product(c.w[2], kPhiloxM1);
  return {{high(p1) ^ c.w[1] ^ k0, low(p1), high(p0) ^ c.w[3] ^ k1, low(p0)}};
}

// The generator as published.
template <int Rounds = kPhiloxRounds>
FLATKERN_HD Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < Rounds; ++round) {
    c = philox_round(c, k0, k1);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// What the first three rounds compute for a whole row: the column enters them in one word only.
struct PhiloxRow {
  uint32_t c0_1;        // round 1: c0 = group ^ c0_1
  uint32_t c2_2;        // round 2: c2 = high(c0 * M0) ^ c2_2
  uint32_t c0_3, c2_3;  // round 3: c0 = high(c2 * M1) ^ c0_3, c2 = low of round 2's c0 ^ c2_3
  uint32_t c3_3;        // round 3: c3
  uint32_t k[2 * (kPhiloxRounds - 3)];  // keys of the remaining rounds
};

FLATKERN_HD PhiloxRow philox_row(NoiseKey key, uint32_t row) {
  uint32_t k0 = key.seed, k1 = key.step;
  const uint64_t p_row = product(row, kPhiloxM0), p_tensor = product(key.tensor, kPhiloxM1);
  PhiloxRow r;
  r.c0_1 = high(p_tensor) ^ k0;
  const uint32_t c2_1 = high(p_row) ^ key.draw ^ k1;
  k0 += kPhiloxW0;
  k1 += kPhiloxW1;
  const uint64_t p1 = product(c2_1, kPhiloxM1);
  const uint32_t c0_2 = high(p1) ^ low(p_tensor) ^ k0;
  r.c2_2 = low(p_row) ^ k1;
  k0 += kPhiloxW0;
  k1 += kPhiloxW1;
  const uint64_t p0 = product(c0_2, kPhiloxM0);
  r.c0_3 = low(p1) ^ k0;
  r.c2_3 = high(p0) ^ k1;
  r.c3_3 = low(p0);
  for (int round = 0; round < kPhiloxRounds - 3; ++round) {
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
    r.k[2 * round] = k0;
    r.k[2 * round + 1] = k1;
    opaque(r.k[2 * round]);
    opaque(r.k[2 * round + 1]);
  }
  return r;
}

// philox4x32 of (row, group, tensor, draw), from what its row has computed.
FLATKERN_HD Words philox_group(const PhiloxRow& r, uint32_t group) {
  const uint64_t p0 = product(group ^ r.c0_1, kPhiloxM0);
  const uint64_t p1 = product(high(p0) ^ r.c2_2, kPhiloxM1);
  Words c = {{high(p1) ^ r.c0_3, low(p1), low(p0) ^ r.c2_3, r.c3_3}};
  for (int round = 0; round < kPhiloxRounds - 3; ++round) {
    c = philox_round(c, r.k[2 * round], r.k[2 * round + 1]);
  }
  return c;
}

// u in (0, 1] and v in [-1, 1]: z = sqrt(-2 ln u) * (cos(pi v), sin(pi v)).
FLATKERN_HD float radius_uniform(uint32_t a) {
#ifdef __CUDA_ARCH__
  // The product is exact, so that fusing changes no bit.
  return __fmaf_rn(static_cast<float>(a), 0x1p-32f, 0x1p-33f);
#else
  return static_cast<float>(a) * 0x1p-32f + 0x1p-33f;
#endif
}
FLATKERN_HD float angle_uniform(uint32_t b) {
  return static_cast<float>(static_cast<int32_t>(b)) * 0x1p-31f;
}

// The op `uniform`: an odd multiple of 2^-24 in (-1, 1). An odd integer below 2^24 in magnitude is
// a float, so that nothing is rounded.
FLATKERN_HD float unit_uniform(uint32_t word) {
  const uint32_t odd = (word >> 7 | 1u) - (1u << 24);
  return static_cast<float>(static_cast<int32_t>(odd)) * 0x1p-24f;
}

}  // namespace flatkern

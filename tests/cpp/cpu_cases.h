// What the tests of the CPU kernels share: weights, the instruction sets to try, and threads.
#pragma once

#include <thread>

#include "../../csrc/cpu/kernels.h"
#include "check.h"

// `make sanitize` looks for races between several threads.
#ifndef FLATKERN_TEST_THREADS
#define FLATKERN_TEST_THREADS 1
#endif

namespace flatkern::cpu {

using check::kDtypes;
using check::size_of;

inline constexpr NoiseKey kKey = {0x01234567u, 0x89ABCDEFu, 5u, 0xFFFFFFFFu};

// Normal numbers, or any bits: NaN, infinities and denormals among them.
inline std::vector<char> random_weights(int64_t count, Dtype dtype, bool wild, uint32_t seed,
                                        float deviation = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<char> bytes(count * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = wild ? generator() : check::rounded(normal(generator), dtype);
    memcpy(bytes.data() + i * size_of(dtype), &bits, size_of(dtype));
  }
  return bytes;
}

// The portable kernels first, then those of this processor's instruction sets.
inline std::vector<const Kernels*> kernels_here() {
  std::vector<const Kernels*> found = {portable_kernels()};
#ifdef FLATKERN_MULTI_ISA
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) found.push_back(avx2_kernels());
  if (avx2 && __builtin_cpu_supports("avx512vl")) found.push_back(avx512_kernels());
#endif
  return found;
}

// Runs a kernel over its units, in ranges on threads of their own where the build asks for several.
template <class Args>
void on_threads(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t units) {
  constexpr int64_t threads = FLATKERN_TEST_THREADS;
  if (threads == 1) return kernel(args, 0, units);
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    running.emplace_back(kernel, std::cref(args), units * t / threads, units * (t + 1) / threads);
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace flatkern::cpu

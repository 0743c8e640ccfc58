// Chooses the kernels for this processor.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace flatkern::cpu {

static const Kernels* widest_supported() {
#ifdef FLATKERN_MULTI_ISA
  // Named to benchmark and test a narrower set; an unknown or unsupported name changes nothing.
  const char* named = std::getenv("FLATKERN_CPU_ISA");
  const auto is_named = [&](const char* name) {
    return named != nullptr && std::strcmp(named, name) == 0;
  };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && !is_named("avx2") && !is_named("portable")) return avx512_kernels();
  if (avx2 && !is_named("portable")) return avx2_kernels();
#endif
  return portable_kernels();
}

const Kernels& kernels() {
  static const Kernels* const table = widest_supported();
  return *table;
}

}  // namespace flatkern::cpu

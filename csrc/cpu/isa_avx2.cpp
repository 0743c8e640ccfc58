// Kernels for processors with AVX2, FMA and F16C, whatever the compiler's own target is.
#include "kernels.h"

#ifdef FLATKERN_MULTI_ISA
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define FLATKERN_ISA avx2
#define FLATKERN_VECTOR_BYTES 32
#include "isa.h"

const flatkern::cpu::Kernels* flatkern::cpu::avx2_kernels() { return &kTable; }
#else
const flatkern::cpu::Kernels* flatkern::cpu::avx2_kernels() { return nullptr; }
#endif

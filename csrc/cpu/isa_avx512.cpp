// Kernels for processors with AVX-512 (F, DQ, BW, VL), whatever the compiler's own target is.
#include "kernels.h"

#ifdef FLATKERN_MULTI_ISA
#include <immintrin.h>
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define FLATKERN_ISA avx512
#define FLATKERN_VECTOR_BYTES 64
#include "isa.h"

const flatkern::cpu::Kernels* flatkern::cpu::avx512_kernels() { return &kTable; }
#else
const flatkern::cpu::Kernels* flatkern::cpu::avx512_kernels() { return nullptr; }
#endif

// Kernels for any processor: 128-bit vectors, which compilers lower where there are none.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "kernels.h"

#define FLATKERN_ISA portable
#define FLATKERN_VECTOR_BYTES 16
#include "isa.h"

const flatkern::cpu::Kernels* flatkern::cpu::portable_kernels() { return &kTable; }

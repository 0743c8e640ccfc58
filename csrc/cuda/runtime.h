// The CUDA runtime, or what stands in for it where tests run the kernels on the host.
#pragma once

#ifdef FLATKERN_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>

// Launches and returns; register.cpp checks the launch.
#define FLATKERN_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

// What the tests of the emulated CUDA kernels share: keys, scales, and launches that are counted.
#pragma once

#include <utility>

#include "../../csrc/cuda/kernels.h"
#include "check.h"

inline constexpr int64_t kKey[] = {0x01234567, 0x89ABCDEF, 5, 0xFFFFFFFF};
inline const cudaStream_t kStream = reinterpret_cast<cudaStream_t>(0x5EA);

inline flatkern::cuda::Window window(int64_t rows, int64_t cols, uint64_t row_offset,
                                     uint64_t col_offset) {
  return {kKey, rows, cols, row_offset, col_offset};
}

// Runs `call`, which must launch this many kernels, all of them on the stream that it was given.
template <class F>
void launched(const F& call, size_t kernels) {
  emulator::launches.clear();
  call();
  CHECK(emulator::launches.size() == kernels, "%zu launches", emulator::launches.size());
  for (const emulator::Launch& launch : emulator::launches) {
    CHECK(launch.stream == kStream, "%s is on another stream", launch.kernel.c_str());
  }
}

inline std::vector<float> noise_of(const flatkern::cuda::Window& w, int sm_count) {
  check::Guarded out(w.rows * w.cols * 4);
  launched([&] { flatkern::cuda::launch_noise({w, out.data()}, sm_count, kStream); }, 1);
  const float* z = reinterpret_cast<const float*>(out.data());
  return {z, z + w.rows * w.cols};
}

// Scales of ordinary size and those that need care, starting anywhere among them.
inline std::vector<float> scales_of(int64_t rows, int64_t start) {
  const float special[] = {0.05f,     1.0f,      0.0f,   -0.0f,       NAN,       INFINITY,
                           -INFINITY, 0x1p-149f, 3e-39f, 0x1.8p-101f, 0x1p-100f, 0x1p126f,
                           3e38f,     -0.7f,     1e-3f,  0x1.FFp125f, 300.0f};
  std::vector<float> scales(rows);
  for (int64_t i = 0; i < rows; ++i)
    scales[i] = special[(start + i) % (sizeof special / sizeof *special)];
  return scales;
}

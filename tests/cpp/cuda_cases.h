// What the tests of the emulated CUDA kernels share: keys, scales, and launches that are counted.
#pragma once

#include <cmath>
#include <utility>

#include "../../csrc/cuda/kernels.h"
#include "check.h"

inline constexpr int64_t kKey[] = {0x01234567, 0x89ABCDEF, 5, 0xFFFFFFFF};
inline const cudaStream_t kStream = reinterpret_cast<cudaStream_t>(0x5EA);

inline flatkern::cuda::Block block_of(int64_t rows, int64_t cols, uint64_t row_offset,
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

inline std::vector<float> noise_of(const flatkern::cuda::Block& w, int sm_count) {
  check::Guarded out(w.rows * w.cols * 4);
  launched([&] { flatkern::cuda::launch_noise({w, out.data()}, sm_count, kStream); }, 1);
  const float* z = reinterpret_cast<const float*>(out.data());
  return {z, z + w.rows * w.cols};
}

inline std::vector<float> uniform_of(const flatkern::cuda::Block& w, int sm_count) {
  check::Guarded out(w.rows * w.cols * 4);
  launched([&] { flatkern::cuda::launch_uniform({w, out.data()}, sm_count, kStream); }, 1);
  const float* u = reinterpret_cast<const float*>(out.data());
  return {u, u + w.rows * w.cols};
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

// A weight and its adapters. A's rows end where the columns do, wherever that is.
struct Problem {
  check::Matrix weight, lora_A, lora_B;
  int64_t rank;

  Problem(flatkern::Dtype dtype, int64_t rows, int64_t cols, int64_t rank, int64_t padding = 0,
          int shift = 0, flatkern::Dtype adapter_dtype = flatkern::Dtype::kFloat32)
      : weight(dtype, rows, cols, padding, shift),
        lora_A(adapter_dtype, rank > 0 ? rank : 1, cols, padding, shift),
        lora_B(adapter_dtype, rows, rank > 0 ? rank : 1),
        rank(rank) {
    weight.fill(false, 1);
    lora_A.fill(false, 2);
    lora_B.fill(false, 3);
  }
  // Whole rows times a power of two.
  void scale_row(int64_t i, int exponent) {
    for (int64_t j = 0; j < weight.cols; ++j) {
      weight.set(i, j, check::rounded(std::ldexp(weight.value(i, j), exponent), weight.dtype));
    }
    for (int64_t k = 0; k < rank; ++k) {
      lora_B.set(i, k, check::rounded(std::ldexp(lora_B.value(i, k), exponent), lora_B.dtype));
    }
  }
  flatkern::cuda::RowNormArgs args(float* norm, float relative_scale = 1.0f) const {
    return {weight.rows,
            weight.cols,
            rank,
            weight.at(0, 0),
            weight.dtype,
            weight.stride,
            {lora_A.at(0, 0), lora_A.dtype, lora_A.stride, 1},
            {lora_B.at(0, 0), lora_B.dtype, lora_B.stride, 1},
            1.0f,
            relative_scale,
            norm,
            nullptr};
  }
  // The norm of row i in float64, and that of absolute values, which rounding is relative to.
  std::pair<double, double> exact(int64_t i) const {
    double square = 0, size = 0;
    for (int64_t j = 0; j < weight.cols; ++j) {
      double merged = weight.value(i, j), absolute = std::fabs(merged);
      for (int64_t k = 0; k < rank; ++k) {
        const double product = static_cast<double>(lora_B.value(i, k)) * lora_A.value(k, j);
        merged += product;
        absolute += std::fabs(product);
      }
      square += merged * merged;
      size += absolute * absolute;
    }
    return {std::sqrt(square), std::sqrt(size)};
  }
};

// With scratch that holds what nobody wrote: NaN.
inline void run_row_norm(const std::vector<flatkern::cuda::RowNormArgs>& tensors) {
  const int64_t bytes = flatkern::cuda::row_norm_scratch(tensors);
  check::Guarded scratch(bytes);
  memset(scratch.data(), 0xFF, bytes);
  flatkern::cuda::launch_row_norm(tensors, scratch.data(), kStream);
}

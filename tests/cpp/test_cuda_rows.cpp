// The CUDA row norms and the fused perturbation, run on the host by cuda_emulator.h: norms against
// float64, the fused kernel against the two that it stands for, bit for bit.
#include <cmath>
#include <functional>

#include "../../csrc/cuda/launch.h"
#include "cuda_cases.h"

using namespace flatkern;
using namespace check;

namespace {

// A weight and its adapters as register.cpp hands them over.
struct Problem {
  Matrix weight, lora_A, lora_B;
  int64_t rank;

  Problem(Dtype dtype, int64_t rows, int64_t cols, int64_t rank, int64_t padding = 0, int shift = 0)
      : weight(dtype, rows, cols, padding, shift),
        lora_A(Dtype::kFloat32, rank > 0 ? rank : 1, (cols + 7) / 8 * 8),
        lora_B(Dtype::kFloat32, rows, rank > 0 ? rank : 1),
        rank(rank) {
    weight.fill(false, 1);
    lora_A.fill(false, 2);
    lora_B.fill(false, 3);
    for (int64_t k = 0; k < lora_A.rows; ++k) {
      for (int64_t j = cols; j < lora_A.cols; ++j) lora_A.set(k, j, 0);
    }
  }
  // Whole rows times a power of two.
  void scale_row(int64_t i, int exponent) {
    for (int64_t j = 0; j < weight.cols; ++j) {
      weight.set(i, j, rounded(std::ldexp(weight.value(i, j), exponent), weight.dtype));
    }
    for (int64_t k = 0; k < rank; ++k) {
      lora_B.set(i, k, bits_of_float(std::ldexp(lora_B.value(i, k), exponent)));
    }
  }
  cuda::RowNormArgs args(float* norm, float relative_scale = 1.0f) const {
    return {weight.rows,
            weight.cols,
            rank,
            weight.at(0, 0),
            weight.dtype,
            weight.stride,
            reinterpret_cast<const float*>(lora_A.at(0, 0)),
            lora_A.stride,
            reinterpret_cast<const float*>(lora_B.at(0, 0)),
            relative_scale,
            norm};
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

std::vector<float> norms_of(const Problem& p, int sm_count, size_t kernels) {
  const int64_t rows = p.weight.rows;
  Guarded norm(rows * 4);
  float* norms = reinterpret_cast<float*>(norm.data());
  launched([&] { cuda::launch_row_norm(p.args(norms), sm_count, kStream); }, kernels);
  return {norms, norms + rows};
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

void check_norms(const Problem& p) {
  const std::vector<float> norms = norms_of(p, 132, 1);
  for (int64_t i = 0; i < p.weight.rows; ++i) {
    const auto [exact, size] = p.exact(i);
    const double bound = (p.rank + 10) * 0x1p-24 * size + 0x1p-149;
    const bool fits = exact < 3.4e38;
    CHECK(fits ? std::fabs(norms[i] - exact) <= bound : std::isinf(norms[i]),
          "%s, row %ld of %ld columns, rank %ld: %g, not %g", name_of(p.weight.dtype), i,
          p.weight.cols, p.rank, norms[i], exact);
  }
}

void test_row_norm() {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t cols : {1, 7, 8, 9, 255, 256, 257, 300, 2056}) {
      const int64_t aligning = (8 - cols % 8) % 8;
      for (const int64_t rank : {0, 1, 5, 8, 33}) {
        check_norms({dtype, 3, cols, rank, aligning});
        check_norms({dtype, 3, cols, rank, 0, 1});
      }
    }
    // Rows that float32 squares cannot hold, or lose.
    Problem wide(dtype, 6, 300, 2, 4);
    const int largest = dtype == Dtype::kFloat16 ? 12 : 120;
    const int smallest = dtype == Dtype::kFloat16 ? -20 : -120;
    wide.scale_row(0, largest), wide.scale_row(1, smallest);
    wide.scale_row(2, dtype == Dtype::kFloat16 ? 0 : 64);
    wide.scale_row(3, dtype == Dtype::kFloat16 ? 0 : -64);
    check_norms(wide);
    for (int64_t j = 0; j < 300; ++j) wide.weight.set(4, j, 0), wide.weight.set(5, j, 0);
    for (int64_t k = 0; k < 2; ++k) wide.lora_B.set(4, k, 0), wide.lora_B.set(5, k, 0);
    wide.weight.set(5, 299, rounded(NAN, dtype));
    const std::vector<float> norms = norms_of(wide, 132, 1);
    CHECK(norms[4] == 0.0f && std::isnan(norms[5]), "%g and %g", norms[4], norms[5]);

    // 33 rows on one SM share loads of A but for the last; on more, no rows do.
    for (const int64_t padding : {4, 1}) {
      const Problem p(dtype, 33, 300, 5, padding);
      const std::vector<float> shared = norms_of(p, 1, 2);
      check_norms(p);
      CHECK(same_bits(shared, norms_of(p, 132, 1)), "shared rows, %s", name_of(dtype));
      emulator::reversed = true;
      CHECK(same_bits(shared, norms_of(p, 1, 2)), "the order of threads, %s", name_of(dtype));
      emulator::reversed = false;
    }
    const Problem many(dtype, 160, 40, 3);
    CHECK(same_bits(norms_of(many, 1, 1), norms_of(many, 132, 1)), "warps that walk");
  }
}

// c and the weight that the two kernels, or the fused one, leave.
struct Merged {
  std::vector<float> scale;
  bool fused;
};

Merged merge(Problem& p, bool elementwise, int sm_count, bool parts) {
  const int64_t rows = p.weight.rows;
  Guarded norm(rows * 4);
  float* scale = reinterpret_cast<float*>(norm.data());
  const cuda::RowNormArgs norms = p.args(scale, 0.0123f);
  const cuda::PerturbArgs perturb = {window(rows, p.weight.cols, 9, 0),
                                     p.weight.at(0, 0),
                                     p.weight.at(0, 0),
                                     p.weight.dtype,
                                     p.weight.dtype,
                                     p.weight.stride,
                                     p.weight.stride,
                                     scale,
                                     elementwise};
  emulator::launches.clear();
  if (parts) {
    cuda::launch_row_norm(norms, sm_count, kStream);
    cuda::launch_perturb(perturb, sm_count, kStream);
  } else {
    cuda::launch_perturb_merged({perturb, norms}, sm_count, kStream);
  }
  const bool fused = emulator::launches.size() == 1;
  for (const emulator::Launch& launch : emulator::launches)
    CHECK(launch.stream == kStream, "stream");
  return {{scale, scale + rows}, fused};
}

using Spoil = std::function<void(Problem&)>;

void check_merged(bool fuses, Dtype dtype, int64_t rows, int64_t cols, int64_t rank,
                  int64_t padding, int shift = 0, const Spoil& spoil = {}) {
  for (const bool elementwise : {false, true}) {
    Problem parts(dtype, rows, cols, rank, padding, shift);
    if (spoil) spoil(parts);
    const Merged expected = merge(parts, elementwise, 2, true);
    for (const auto& [sm_count, reversed] : {std::pair(1, false), {1, true}, {132, false}}) {
      Problem p(dtype, rows, cols, rank, padding, shift);
      if (spoil) spoil(p);
      emulator::reversed = reversed;
      const Merged got = merge(p, elementwise, sm_count, false);
      emulator::reversed = false;
      CHECK(got.fused == fuses, "%ld columns, rank %ld: fused %d", cols, rank, got.fused);
      CHECK(same_bits(got.scale, expected.scale) && p.weight.same_bits(parts.weight),
            "%s, %ld x %ld, rank %ld, %d SMs, reversed %d", name_of(dtype), rows, cols, rank,
            sm_count, reversed);
    }
  }
}

void test_perturb_merged() {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t cols : {1, 8, 9, 255, 256, 257, 264, 2000, 4095, 4096}) {
      check_merged(true, dtype, cols > 1000 ? 5 : 7, cols, 3, (8 - cols % 8) % 8);
    }
    for (const int64_t rows : {1, 3, 4, 5, 8, 21}) check_merged(true, dtype, rows, 72, 32, 8);
    check_merged(true, dtype, 37, 520, 0, 0);
    check_merged(false, dtype, 3, 4097, 2, 7);
    check_merged(false, dtype, 3, 264, 33, 0);
    check_merged(false, dtype, 3, 264, 2, 1);
    check_merged(false, dtype, 3, 264, 2, 0, 1);
    // Rows with scales that are huge, tiny, zero and not finite, and elements that are not.
    check_merged(true, dtype, 9, 300, 2, 4, 0, [](Problem& p) {
      const int limit = p.weight.dtype == Dtype::kFloat16 ? 12 : 120;
      p.scale_row(0, limit), p.scale_row(1, -limit), p.scale_row(5, -limit);
      for (int64_t j = 0; j < 300; ++j) p.weight.set(3, j, 0);
      for (int64_t k = 0; k < 2; ++k) p.lora_B.set(3, k, 0);
      p.weight.set(4, 297, rounded(NAN, p.weight.dtype));
      p.weight.set(6, 11, rounded(-INFINITY, p.weight.dtype));
    });
  }
}

void test_empty() {
  float scale[2] = {7, 7};
  const cuda::RowNormArgs norms = {2, 0,       0,    nullptr, Dtype::kFloat32, 0, nullptr,
                                   0, nullptr, 0.5f, scale};
  const cuda::PerturbArgs perturb = {
      window(2, 0, 0, 0), nullptr, nullptr, Dtype::kFloat32, Dtype::kFloat32, 0, 0, scale, false};
  launched([&] { cuda::launch_row_norm(norms, 132, kStream); }, 1);
  CHECK(scale[0] == 0.0f && scale[1] == 0.0f, "norms of rows without columns");
  scale[0] = scale[1] = 7;
  launched([&] { cuda::launch_perturb_merged({perturb, norms}, 132, kStream); }, 1);
  CHECK(scale[0] == 0.0f && scale[1] == 0.0f, "scales of rows without columns");
  cuda::RowNormArgs no_rows = norms;
  cuda::PerturbArgs none = perturb;
  no_rows.rows = none.window.rows = 0;
  launched([&] { cuda::launch_row_norm(no_rows, 132, kStream); }, 0);
  launched([&] { cuda::launch_perturb_merged({none, no_rows}, 132, kStream); }, 0);
}

// Rows that lie more than 2^31 elements apart: memory that is never touched costs nothing.
void test_beyond_int32() {
  for (const int64_t padding : {int64_t{1} << 30, (int64_t{1} << 30) + 1}) {
    Problem p(Dtype::kBFloat16, 37, 264, 2, 0);
    Matrix big(Dtype::kBFloat16, 37, 264, padding, 0, true);
    big.copy_from(p.weight);
    std::vector<float> scale(37);
    cuda::RowNormArgs norms = p.args(scale.data());
    norms.weight = big.at(0, 0);
    norms.weight_stride = big.stride;
    launched([&] { cuda::launch_row_norm(norms, 1, kStream); }, 2);
    CHECK(same_bits(scale, norms_of(p, 1, 2)), "norms, stride %ld", big.stride);
    cuda::PerturbArgs perturb = {window(37, 264, 0, 0),
                                 big.at(0, 0),
                                 big.at(0, 0),
                                 big.dtype,
                                 big.dtype,
                                 big.stride,
                                 big.stride,
                                 scale.data(),
                                 false};
    cuda::launch_perturb_merged({perturb, norms}, 1, kStream);
    perturb.weight = perturb.out = p.weight.at(0, 0);
    perturb.weight_stride = perturb.out_stride = p.weight.stride;
    cuda::launch_perturb_merged({perturb, p.args(scale.data())}, 1, kStream);
    CHECK(big.same_bits(p.weight), "perturb_merged, stride %ld", big.stride);
  }
}

}  // namespace

int main() {
  test_row_norm();
  test_perturb_merged();
  test_empty();
  test_beyond_int32();
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// The CUDA row norms and the fused perturbation, run on the host by cuda_emulator.h: norms against
// float64, the fused kernel against the two that it stands for, bit for bit.
#include <cmath>
#include <functional>

#include "../../csrc/cuda/launch.h"
#include "cuda_cases.h"

using namespace flatkern;
using namespace check;

namespace {

std::vector<float> norms_of(const Problem& p, int sm_count, size_t kernels) {
  const int64_t rows = p.weight.rows;
  Guarded norm(rows * 4);
  float* norms = reinterpret_cast<float*>(norm.data());
  launched([&] { cuda::launch_row_norm({p.args(norms)}, sm_count, kStream); }, kernels);
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
      for (const int64_t rank : {0, 1, 5, 8, 16}) {
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

// Norms of ranks beyond kDirectRank, the same to the bit with one or two tiles of rows in a block
// and with threads in any order.
std::vector<float> mma_norms(const Problem& p) {
  const std::vector<float> norms = norms_of(p, 132, 1);
  CHECK(emulator::launches[0].kernel.find("mma") != std::string::npos, "tensor cores");
  emulator::reversed = true;
  CHECK(same_bits(norms, norms_of(p, 1, 1)), "%s, %ld x %ld, rank %ld: SMs and threads",
        name_of(p.weight.dtype), p.weight.rows, p.weight.cols, p.rank);
  emulator::reversed = false;
  return norms;
}

// To the accuracy of float32: a product of split values lacks 2^-26 of itself, 16 of them are
// summed with a few truncations by 2^-23 of their sum, and such sums added with one rounding each.
void check_mma(const Problem& p) {
  const std::vector<float> norms = mma_norms(p);
  for (int64_t i = 0; i < p.weight.rows; ++i) {
    const auto [exact, size] = p.exact(i);
    CHECK(std::fabs(norms[i] - exact) <= 5e-7 * size,
          "%s, row %ld of %ld x %ld, rank %ld: %g, not %g", name_of(p.weight.dtype), i,
          p.weight.rows, p.weight.cols, p.rank, norms[i], exact);
  }
}

void test_mma() {
  const int64_t all_rows[] = {1, 15, 16, 17, 33, 40};
  int turn = 0;
  for (const int64_t cols : {1, 7, 31, 33, 263}) {
    for (const int64_t rank : {17, 32, 33, 64, 100}) {
      const Dtype dtype = kDtypes[turn % 3];
      const int64_t rows = all_rows[turn % 6];
      check_mma({dtype, rows, cols, rank, turn % 2 == 0 ? (8 - cols % 8) % 8 : 0, turn % 2});
      ++turn;
    }
  }
  for (const Dtype dtype : kDtypes) {
    // More ranks than are staged; alignment does not matter, nor what lies between rows.
    check_mma({dtype, 17, 40, 150});
    const Problem aligned(dtype, 70, 36, 18, 4), unaligned(dtype, 70, 36, 18, 0, 1);
    CHECK(same_bits(mma_norms(aligned), mma_norms(unaligned)), "alignment, %s", name_of(dtype));
    // Parts of one sign, so that no product of them may be missing.
    Problem ones(dtype, 18, 40, 32);
    for (Matrix* m : {&ones.lora_A, &ones.lora_B}) {
      for (int64_t i = 0; i < m->rows; ++i) {
        for (int64_t j = 0; j < m->cols; ++j) m->set(i, j, bits_of_float(0x1.00e6f2p0f));
      }
    }
    check_mma(ones);
  }
}

// Ranks past the last one are neither read nor used, nor is another row's B. A sum that is not
// finite would be summed again in float64, so the bits tell.
void test_mma_masks() {
  for (const int64_t rank : {18, 35}) {
    const Problem clean(Dtype::kBFloat16, 40, 72, rank);
    const std::vector<float> expected = norms_of(clean, 1, 1);
    Problem longer(Dtype::kBFloat16, 40, 72, rank + 16);
    for (int64_t k = 0; k < rank + 16; ++k) {
      for (int64_t j = 0; j < 72; ++j) {
        longer.lora_A.set(k, j, k < rank ? clean.lora_A.bits(k, j) : bits_of_float(NAN));
      }
    }
    cuda::RowNormArgs args = clean.args(nullptr);
    args.lora_A = longer.args(nullptr).lora_A;
    std::vector<float> norms(40);
    args.norm = norms.data();
    cuda::launch_row_norm({args}, 1, kStream);
    CHECK(same_bits(norms, expected), "ranks past %ld of A", rank);

    Problem spoiled(Dtype::kBFloat16, 40, 72, rank);
    for (int64_t k = 0; k < rank; ++k) spoiled.lora_B.set(7, k, bits_of_float(NAN));
    norms = norms_of(spoiled, 1, 1);
    CHECK(std::isnan(norms[7]), "%g", norms[7]);
    norms[7] = expected[7];
    CHECK(same_bits(norms, expected), "ranks past %ld of B", rank);
  }
}

// Rows that float32 or the splitting cannot hold.
void test_mma_range() {
  for (const Dtype dtype : kDtypes) {
    Problem p(dtype, 20, 40, 20);
    const int largest = dtype == Dtype::kFloat16 ? 12 : 120;
    p.scale_row(0, largest), p.scale_row(1, dtype == Dtype::kFloat16 ? -20 : -120);
    for (int64_t j = 0; j < 40; ++j) p.weight.set(4, j, 0);
    for (int64_t k = 0; k < 20; ++k) p.lora_B.set(4, k, 0);
    p.weight.set(18, 3, rounded(INFINITY, dtype));
    p.weight.set(19, 39, rounded(NAN, dtype));
    const std::vector<float> norms = norms_of(p, 132, 1);
    for (int64_t i = 0; i < 18; ++i) {
      const auto [exact, size] = p.exact(i);
      CHECK(std::fabs(norms[i] - exact) <= 5e-7 * size, "row %ld: %g, not %g", i, norms[i], exact);
    }
    CHECK(std::isinf(norms[18]) && std::isnan(norms[19]), "%g and %g", norms[18], norms[19]);
    // Rounds to an infinite bfloat16.
    p.lora_A.set(3, 5, bits_of_float(0x1.FFFFFEp127f));
    for (int64_t i = 0; i < 20; ++i) p.lora_B.set(i, 3, bits_of_float(0x1p-127f));
    const auto [exact, size] = p.exact(2);
    CHECK(std::fabs(norms_of(p, 132, 1)[2] - exact) <= 5e-7 * size, "A near the largest float");
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
    cuda::launch_row_norm({norms}, sm_count, kStream);
    cuda::launch_perturb({perturb}, sm_count, kStream);
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
    for (const int64_t rows : {1, 3, 4, 5, 8, 21}) check_merged(true, dtype, rows, 72, 16, 8);
    check_merged(true, dtype, 37, 520, 0, 0);
    check_merged(false, dtype, 3, 4097, 2, 7);
    check_merged(false, dtype, 3, 264, 17, 0);
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
  launched([&] { cuda::launch_row_norm({norms}, 132, kStream); }, 1);
  CHECK(scale[0] == 0.0f && scale[1] == 0.0f, "norms of rows without columns");
  scale[0] = scale[1] = 7;
  launched([&] { cuda::launch_perturb_merged({perturb, norms}, 132, kStream); }, 1);
  CHECK(scale[0] == 0.0f && scale[1] == 0.0f, "scales of rows without columns");
  cuda::RowNormArgs no_rows = norms;
  cuda::PerturbArgs none = perturb;
  no_rows.rows = none.window.rows = 0;
  launched([&] { cuda::launch_row_norm({no_rows}, 132, kStream); }, 0);
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
    launched([&] { cuda::launch_row_norm({norms}, 1, kStream); }, 2);
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
  test_mma();
  test_mma_masks();
  test_mma_range();
  test_perturb_merged();
  test_empty();
  test_beyond_int32();
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// The CUDA row norms, run on the host by cuda_emulator.h, against float64: the sum by algebra with
// the bound of its error, and what comes of it.
#include <algorithm>
#include <cmath>

#include "../../csrc/cuda/row_norm.h"
#include "cuda_cases.h"

using namespace flatkern;
using namespace check;

namespace {

struct Norms {
  std::vector<float> norms;
  int accepted = 0;  // rows whose sum by algebra stands
};

// Checks every row: the sum by algebra is as near as its bound says wherever float32 holds its
// parts, and the norm to 1e-5 of itself.
Norms check_norms(const Problem& p, float relative_scale = 1.0f) {
  const int64_t rows = p.weight.rows;
  Guarded norm(rows * 4);
  cuda::RowNormArgs args = p.args(reinterpret_cast<float*>(norm.data()), relative_scale);
  const int64_t bytes = cuda::row_norm_scratch({args});
  Guarded memory(bytes);
  memset(memory.data(), 0xFF, bytes);
  launched([&] { cuda::launch_row_norm({args}, memory.data(), kStream); }, 2);
  args.scratch = memory.data();
  const cuda::NormScratch scratch = cuda::scratch_of(args);
  CHECK(static_cast<int64_t>(scratch.bytes) == bytes, "%ld bytes", bytes);
  Norms found;
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0, sum = 0, form = 0, u = 0;
    for (int panel = 0; panel < scratch.panels; ++panel) {
      squares += scratch.squares()[panel * scratch.rows + i];
      if (p.rank > 0) sum += 2.0 * scratch.crosses()[panel * scratch.rows + i];
    }
    if (p.rank > 0) form = scratch.forms()[2 * i], u = scratch.forms()[2 * i + 1];
    sum += squares + form;
    const double exact = p.exact(i).first;
    const bool tame = exact * exact > 1e-28 && exact * exact < 1e37 && std::isfinite(u);
    const double bound = cuda::kSquareError * squares +
                         2 * cuda::cross_error(scratch.blocks) * std::sqrt(squares) * u +
                         cuda::kFormError * u * u;
    CHECK(!tame || std::fabs(sum - exact * exact) <= bound,
          "%s, row %ld of %ld x %ld, rank %ld: square %g, not %g to %g", name_of(p.weight.dtype), i,
          rows, p.weight.cols, p.rank, sum, exact * exact, bound);
    found.accepted += cuda::is_accurate(sum, squares, u, scratch.blocks);
    found.norms.push_back(args.norm[i]);
    const double expected = exact * relative_scale, got = args.norm[i];
    const bool same = std::isnan(expected) ? std::isnan(got)
                      : expected > 3.4e38 ? std::isinf(got)
                                          : std::fabs(got - expected) <= 1e-5 * expected + 0x1p-149;
    CHECK(same, "%s, row %ld of %ld x %ld, rank %ld: %g, not %g", name_of(p.weight.dtype), i, rows,
          p.weight.cols, p.rank, got, expected);
  }
  return found;
}

bool same_bits(const Norms& a, const Norms& b) {
  return a.norms.size() == b.norms.size() &&
         memcmp(a.norms.data(), b.norms.data(), a.norms.size() * 4) == 0;
}

// Widths about the steps and panels, rows about a warp's and a block's, ranks about the blocks.
void test_shapes() {
  const int64_t all_rows[] = {1, 7, 9, 33, 129};
  const int64_t ranks[] = {0, 1, 16, 17, 33, 64, 100};
  int turn = 0;
  for (const int64_t cols : {1, 7, 8, 9, 31, 33, 65, 255, 256, 257, 520}) {
    for (int i = 0; i < 2; ++i, ++turn) {
      const Dtype dtype = kDtypes[turn % 3];
      // The emulator takes its time for every product.
      const int64_t rows = all_rows[turn % 5], rank = ranks[turn % (cols < 64 ? 7 : 4)];
      const Dtype adapter_dtype = kDtypes[turn / 3 % 3];
      const int64_t padding = turn % 2 == 0 ? (8 - cols % 8) % 8 : turn % 4;
      const Norms found =
          check_norms({dtype, rows, cols, rank, padding, turn % 2, adapter_dtype}, 0.37f);
      if (rank == 0) CHECK(found.accepted == rows, "%d of %ld plain norms", found.accepted, rows);
    }
  }
  for (const Dtype dtype : kDtypes) check_norms({dtype, 5, 20, 200});
}

// Neither alignment nor the order of threads nor a row's place among others changes a bit.
void test_bits() {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t rank : {0, dtype == Dtype::kBFloat16 ? 5 : 20}) {
      const Problem aligned(dtype, 40, 292, rank, 4), unaligned(dtype, 40, 292, rank, 1, 1);
      const Norms norms = check_norms(aligned);
      CHECK(same_bits(norms, check_norms(unaligned)), "alignment, %s", name_of(dtype));
      emulator::reversed = true;
      CHECK(same_bits(norms, check_norms(aligned)), "order of threads, %s", name_of(dtype));
      emulator::reversed = false;
      cuda::RowNormArgs args = aligned.args(nullptr);
      std::vector<float> part(7);
      args.rows = 7;
      args.weight = aligned.weight.at(33, 0);
      args.lora_B.data = aligned.lora_B.at(33, 0);
      args.norm = part.data();
      run_row_norm({args});
      CHECK(memcmp(part.data(), norms.norms.data() + 33, 7 * 4) == 0, "a shard's rows, %s",
            name_of(dtype));
    }
  }
}

// Random rows, which the algebra must serve, and rows that it must refuse: those of W that sBA all
// but cancels, of zeros, at the ends of float32, and not finite.
void test_rows() {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t rank : {3, 40}) {
      const bool half = dtype == Dtype::kFloat16;
      const int64_t cols = rank < 16 ? 264 : 72;
      Problem p(dtype, 24, cols, rank);
      for (int64_t i = 0; i < 24; ++i) {
        for (int64_t k = 0; k < rank; ++k) {
          p.lora_B.set(i, k, bits_of_float(p.lora_B.value(i, k) / static_cast<float>(rank)));
        }
      }
      CHECK(check_norms(p).accepted == 24, "rank %ld, %s", rank, name_of(dtype));
      // What float32 makes of W = -f sBA: for f = 1 less than a thousandth is left.
      const float factors[] = {1.0f, 0.999f, 0.9f, 0.5f};
      for (int64_t i = 0; i < 4; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          double v = 0;
          for (int64_t k = 0; k < rank; ++k) {
            v += static_cast<double>(p.lora_B.value(i, k)) * p.lora_A.value(k, j);
          }
          p.weight.set(i, j, rounded(static_cast<float>(-factors[i] * v), dtype));
        }
      }
      p.scale_row(4, half ? 12 : 122), p.scale_row(5, half ? -20 : -120);
      p.scale_row(6, half ? 0 : 64), p.scale_row(7, half ? 0 : -64);
      for (int64_t j = 0; j < cols; ++j) p.weight.set(8, j, 0), p.weight.set(9, j, 0);
      for (int64_t k = 0; k < rank; ++k) p.lora_B.set(8, k, 0);
      p.weight.set(10, cols - 1, rounded(NAN, dtype));
      p.weight.set(11, 0, rounded(-INFINITY, dtype));
      p.lora_B.set(12, rank - 1, bits_of_float(NAN));
      const Norms found = check_norms(p);
      CHECK(found.accepted >= 11 && found.accepted <= 16, "%d accepted", found.accepted);
      CHECK(found.norms[8] == 0.0f, "%g", found.norms[8]);
      CHECK(std::isinf(found.norms[11]), "%g", found.norms[11]);
    }
  }
}

// A start in the singular vectors (PiSSA): B A has the largest part of W, and W what is left of it.
void test_principal_start() {
  for (const Dtype dtype : kDtypes) {
    Problem p(dtype, 16, 128, 16);
    for (int64_t k = 0; k < 16; ++k) {
      // Orthogonal rows of A.
      for (int64_t j = 0; j < 128; ++j) {
        const int sign = __builtin_popcountll(k & j) % 2 == 0 ? 1 : -1;
        p.lora_A.set(k, j, bits_of_float(sign * 0.25f));
      }
    }
    CHECK(check_norms(p).accepted == 16, "orthogonal rows of A, %s", name_of(dtype));
    // Parts of one sign, so that no product of them may be missing.
    for (Matrix* m : {&p.lora_A, &p.lora_B}) {
      for (int64_t i = 0; i < m->rows; ++i) {
        for (int64_t j = 0; j < m->cols; ++j) m->set(i, j, bits_of_float(0x1.00e6f2p0f));
      }
    }
    for (int64_t i = 0; i < 16; ++i) {
      for (int64_t j = 0; j < 128; ++j) p.weight.set(i, j, rounded(1.0017f, dtype));
    }
    CHECK(check_norms(p).accepted == 16, "parts of one sign, %s", name_of(dtype));
  }
}

// Rows of A that cannot be split: nothing of them stands.
void test_unusual_adapters() {
  for (const float size : {1e-35f, 1e30f, NAN, INFINITY}) {
    Problem p(Dtype::kBFloat16, 5, 40, 4);
    for (int64_t j = 0; j < 40; ++j) p.lora_A.set(2, j, bits_of_float(p.lora_A.value(2, j) * size));
    CHECK(check_norms(p).accepted == 0, "A of %g", size);
    if (std::isfinite(size)) {
      for (int64_t i = 0; i < 5; ++i) p.lora_B.set(i, 2, 0);
      CHECK(check_norms(p).accepted == (size < 1 ? 5 : check_norms(p).accepted), "unused rows");
    }
  }
}

void test_empty() {
  float scale[2] = {7, 7};
  cuda::RowNormArgs args{};
  args.rows = 2;
  args.relative_scale = 0.5f;
  args.norm = scale;
  run_row_norm({args});
  CHECK(scale[0] == 0.0f && scale[1] == 0.0f, "norms of rows without columns");
  args.rows = 0;
  launched([&] { run_row_norm({args}); }, 0);
}

// Rows that lie more than 2^31 elements apart: memory that is never touched costs nothing.
void test_beyond_int32() {
  for (const int64_t padding : {int64_t{1} << 30, (int64_t{1} << 30) + 1}) {
    const Problem p(Dtype::kBFloat16, 37, 264, 2);
    Matrix big(Dtype::kBFloat16, 37, 264, padding, 0, true);
    big.copy_from(p.weight);
    std::vector<float> norms(37);
    cuda::RowNormArgs args = p.args(norms.data());
    args.weight = big.at(0, 0);
    args.weight_stride = big.stride;
    run_row_norm({args});
    CHECK(norms == check_norms(p).norms, "stride %ld", big.stride);
  }
}

void test_bound() {
  CHECK(cuda::is_accurate(1.0, 1.0, 0.0, 1) && cuda::is_accurate(2.0, 1.0, 3.0, 1),
        "ordinary rows");
  CHECK(!cuda::is_accurate(0.01, 1.0, 1.0, 1), "what cancels");
  CHECK(!cuda::is_accurate(1.0, 1.0, 4.0, 1), "what cancels among ranks");
  CHECK(!cuda::is_accurate(0.0, 0.0, 0.0, 1) && !cuda::is_accurate(1e-29, 1e-29, 0.0, 1), "small");
  CHECK(!cuda::is_accurate(1e38, 1e38, 0.0, 1) && !cuda::is_accurate(NAN, 1.0, 1.0, 1), "large");
  CHECK(!cuda::is_accurate(1.0, 1.0, INFINITY, 1) && !cuda::is_accurate(1.0, NAN, 1.0, 1),
        "not finite");
}

}  // namespace

int main() {
  test_bound();
  test_shapes();
  test_bits();
  test_rows();
  test_principal_start();
  test_unusual_adapters();
  test_empty();
  test_beyond_int32();
  std::printf("%d failures\n", failures);
  return failures != 0;
}

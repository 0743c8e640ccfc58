// The elementwise CUDA kernels, run on the host by cuda_emulator.h through their own launchers:
// words and normals against csrc/cpu, perturb and restore against their meaning in float64.
#include <cmath>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/launch.h"
#include "check.h"
#include "cuda_cases.h"

using namespace flatkern;
using namespace check;

namespace {

const cpu::Kernels& host() { return *cpu::portable_kernels(); }

cpu::Block on_host(const cuda::Block& w) {
  return {{static_cast<uint32_t>(kKey[0]), static_cast<uint32_t>(kKey[1]),
           static_cast<uint32_t>(kKey[2]), static_cast<uint32_t>(kKey[3])},
          w.rows,
          w.cols,
          w.row_offset,
          w.col_offset};
}

std::vector<int64_t> words_of(const cuda::Block& w, int sm_count) {
  Guarded out(w.rows * w.cols * 8);
  launched([&] { cuda::launch_philox_bits({w, out.data()}, sm_count, kStream); }, 1);
  const int64_t* words = reinterpret_cast<const int64_t*>(out.data());
  return {words, words + w.rows * w.cols};
}

constexpr int64_t kColumns[] = {1,   2,   3,   4,    5,    8,    31,   33,
                                255, 256, 264, 4095, 4096, 4097, 8200, 12289};
constexpr uint64_t kOffsets[] = {0, 1, 2, 3, 4, 7, (1ull << 34) - 12292};

void test_words_and_normals() {
  for (const int64_t cols : kColumns) {
    for (const uint64_t offset : kOffsets) {
      const cuda::Block w = block_of(5, cols, (1ull << 32) - 5, offset);
      const cpu::NoiseArgs args{on_host(w), nullptr};
      std::vector<int64_t> words(w.rows * cols);
      std::vector<float> z(w.rows * cols);
      const int64_t units = w.rows * cpu::blocks_per_row(cols);
      host().philox_bits({args.block, words.data()}, 0, units);
      host().noise({args.block, z.data()}, 0, units);
      const std::vector<float> once = noise_of(w, 132);
      int64_t far = 0;
      for (size_t i = 0; i < z.size(); ++i) far += !(std::fabs(once[i] - z[i]) <= 1e-5f);
      CHECK(far == 0, "%ld normals, %ld columns, offset %lu", far, cols, offset);
      // From the words in double: nothing is rounded, so the bits are the same everywhere.
      std::vector<float> u(w.rows * cols);
      host().uniform({args.block, u.data()}, 0, units);
      const auto exact = [](int64_t word) {
        return std::ldexp(static_cast<double>(2 * (word >> 8) + 1), -24) - 1;
      };
      int64_t wrong = 0;
      for (size_t i = 0; i < u.size(); ++i) wrong += u[i] != exact(words[i]);
      CHECK(wrong == 0, "%ld uniform values, %ld columns, offset %lu", wrong, cols, offset);
      for (const int sm_count : {1, 2, 132}) {
        CHECK(words_of(w, sm_count) == words, "words, %ld columns, offset %lu", cols, offset);
        CHECK(noise_of(w, sm_count) == once, "grids, %ld columns, offset %lu", cols, offset);
        CHECK(uniform_of(w, sm_count) == u, "uniform, %ld columns, offset %lu", cols, offset);
      }
    }
  }
  // A block more, so that warps of a small grid walk through rows too.
  for (const int64_t cols : {5, 4100}) {
    const cuda::Block w = block_of(41, cols, 3, 2);
    CHECK(noise_of(w, 1) == noise_of(w, 132), "walks, %ld columns", cols);
    CHECK(words_of(w, 1) == words_of(w, 132), "walks, %ld columns", cols);
  }
}

// Where a result may lie: e may be off by the noise's tolerance, and the sum is rounded to float32.
struct Interval {
  double low, high;
};

Interval perturbed_interval(double w, double c, double z, bool elementwise) {
  const double size = elementwise ? std::fabs(w) : 1.0, e = c * z * size;
  // Where float32 cannot hold e, the sum is not finite either.
  if (std::fabs(c * z) > 0x1p128 || std::fabs(e) > 0x1p128) return {INFINITY, INFINITY};
  const double slack = 1e-5 * std::fabs(c) * size + 0x1p-23 * std::fabs(w + e) + 0x1p-149;
  return {w + e - slack, w + e + slack};
}

Interval restored_interval(double s, double c, double z, bool elementwise) {
  if (!elementwise) return perturbed_interval(s, c, -z, false);
  const double sign = s > 0 ? 1.0 : s < 0 ? -1.0 : 0.0;
  Interval all = {INFINITY, -INFINITY};
  for (const double slack : {-1e-5 * std::fabs(c) - 1e-6, 1e-5 * std::fabs(c) + 1e-6}) {
    const double factor = 1.0 + (c * z + slack) * sign;
    const double value = factor > 0.0625 ? s / factor : s;
    const double error = 0x1p-22 * std::fabs(value) + 0x1p-149;
    all = {std::fmin(all.low, value - error), std::fmax(all.high, value + error)};
    // Float32 may hold no such factor, and hardware divides by it to 0.
    if (factor > 0x1p126) all = {std::fmin(all.low, 0.0), std::fmax(all.high, 0.0)};
  }
  return all;
}

bool allowed(uint32_t got, uint32_t before, Dtype from, Dtype to, const Interval& interval) {
  const float w = value_of(before, from);
  const bool stays_nan = is_nan(w) && is_nan(value_of(got, to));
  const bool kept = got == (from == to ? before : rounded(w, to)) || (from != to && stays_nan);
  if (!is_finite(w)) return kept;
  const float low = value_of(rounded(static_cast<float>(interval.low), to), to);
  const float high = value_of(rounded(static_cast<float>(interval.high), to), to);
  // Kept where the sum overflows or may overflow.
  if (!is_finite(low) || !is_finite(high)) {
    const bool surely = low == high;
    return kept ||
           (!surely && std::fabs(value_of(got, to)) >= std::fmin(std::fabs(low), std::fabs(high)));
  }
  const float value = value_of(got, to);
  return low <= value && value <= high;
}

struct Case {
  Dtype from, to;
  bool elementwise, restore;
  int64_t rows, cols, padding;
  int shift;  // elements from a multiple of 16 bytes
  uint64_t col_offset;
};

cuda::PerturbArgs args_of(const Case& c, const Matrix& weight, const Matrix& out,
                          const float* scales) {
  return {block_of(c.rows, c.cols, 7, c.col_offset),
          weight.at(0, 0),
          out.at(0, 0),
          c.from,
          c.to,
          weight.stride,
          out.stride,
          scales,
          c.elementwise};
}

void run(const Case& c, const cuda::PerturbArgs& args, int sm_count) {
  const auto launcher = c.restore ? cuda::launch_restore : cuda::launch_perturb;
  launched([&] { launcher({args}, sm_count, kStream); }, 1);
}

void check_case(const Case& c, bool wild) {
  Matrix weight(c.from, c.rows, c.cols, c.padding, c.shift);
  weight.fill(wild, 11);
  const std::vector<float> scales = scales_of(c.rows, c.cols);
  const std::vector<float> z = noise_of(block_of(c.rows, c.cols, 7, c.col_offset), 132);
  Matrix out(c.to, c.rows, c.cols, c.padding, c.shift);
  run(c, args_of(c, weight, out, scales.data()), 132);
  int64_t wrong = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    const float scale = usable_scale(scales[i]);
    for (int64_t j = 0; j < c.cols; ++j) {
      const float w = weight.value(i, j), at = z[i * c.cols + j];
      const Interval interval =
          (c.restore ? restored_interval : perturbed_interval)(w, scale, at, c.elementwise);
      bool ok = allowed(out.bits(i, j), weight.bits(i, j), c.from, c.to, interval);
      // No noise: exact, the sign of zero included.
      if (scale == 0.0f && is_finite(w)) {
        const float value =
            (c.restore ? restored_value : perturbed_value)(w, scale, at, c.elementwise);
        const bool fits = is_finite(value_of(rounded(value, c.to), c.to));
        ok = out.bits(i, j) == rounded(fits ? value : w, c.to);
      }
      if (!ok && ++wrong == 1) {
        std::printf("row %ld, column %ld: %a, scale %a, z %a gives %a\n", i, j, w, scale, at,
                    out.value(i, j));
      }
    }
  }
  CHECK(wrong == 0,
        "%ld wrong: %s to %s, %ld columns, offset %lu, shift %d, elementwise %d, restore %d", wrong,
        name_of(c.from), name_of(c.to), c.cols, c.col_offset, c.shift, c.elementwise, c.restore);

  // Neither the grid, nor the path that an alignment takes, nor the place of the result matters.
  for (const int sm_count : {1, 3}) {
    for (const int shift : {0, 1}) {
      Matrix moved(c.from, c.rows, c.cols, 3, shift), again(c.to, c.rows, c.cols, 8, 0);
      moved.copy_from(weight);
      run(c, args_of(c, moved, again, scales.data()), sm_count);
      CHECK(again.same_bits(out), "%s to %s, %ld columns, %d SMs", name_of(c.from), name_of(c.to),
            c.cols, sm_count);
    }
  }
  if (c.from == c.to) {
    run(c, args_of(c, weight, weight, scales.data()), 2);
    CHECK(weight.same_bits(out), "in place, %s, %ld columns", name_of(c.from), c.cols);
  }
}

void test_perturb_and_restore() {
  for (const Dtype from : kDtypes) {
    for (const Dtype to : kDtypes) {
      for (const bool elementwise : {false, true}) {
        for (const bool restore : {false, true}) {
          if (restore && from != to) continue;
          const Case base = {from, to, elementwise, restore, 12, 264, 0, 0, 0};
          for (const bool wild : {false, true}) check_case(base, wild);
          Case odd = base;
          odd.cols = 267, odd.padding = 5, odd.col_offset = 12;  // aligned, the last vector is cut
          check_case(odd, true);
          odd.shift = 1, odd.col_offset = 3;
          check_case(odd, true);
        }
      }
    }
  }
  for (const int64_t cols : kColumns) {
    // Strides that keep 16-byte alignment whatever the columns, then those that may not.
    const int64_t padding = (8 - cols % 8) % 8;
    for (const uint64_t offset : {0ull, 4ull, 1ull, (1ull << 34) - 12292}) {
      check_case({Dtype::kBFloat16, Dtype::kBFloat16, false, false, 5, cols, padding, 0, offset},
                 false);
    }
    check_case({Dtype::kFloat32, Dtype::kFloat16, true, false, 5, cols, padding, 0, 0}, true);
    check_case({Dtype::kFloat16, Dtype::kFloat16, false, true, 5, cols, 0, 0, 0}, true);
    check_case({Dtype::kFloat32, Dtype::kFloat32, false, false, 1, cols, 0, 1, 2}, false);
  }
  // Warps of a small grid walk through many rows.
  check_case({Dtype::kBFloat16, Dtype::kBFloat16, false, false, 75, 24, 0, 0, 0}, true);
  check_case({Dtype::kFloat32, Dtype::kFloat32, true, false, 41, 4108, 0, 0, 8}, true);
}

void test_paths() {
  // Which kernel runs, by name: all checks above compare paths, which must be two.
  const auto kernel_of = [](int shift, int64_t padding, uint64_t offset) {
    Matrix weight(Dtype::kBFloat16, 2, 264, padding, shift), out(Dtype::kBFloat16, 2, 264);
    const std::vector<float> scales = scales_of(2, 0);
    const Case c = {weight.dtype, out.dtype, false, false, 2, 264, padding, shift, offset};
    run(c, args_of(c, weight, out, scales.data()), 1);
    return emulator::launches.back().kernel.find("unaligned") == std::string::npos;
  };
  CHECK(kernel_of(0, 0, 0) && kernel_of(0, 8, 4), "aligned rows take the vector kernel");
  CHECK(!kernel_of(1, 0, 0) && !kernel_of(0, 4, 0) && !kernel_of(0, 0, 2), "others do not");
}

void test_empty() {
  const float scale = 1.0f;
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{0, 5}, {5, 0}, {0, 0}}) {
    const cuda::Block w = block_of(rows, cols, 0, 0);
    const cuda::PerturbArgs args = {w,    nullptr, nullptr, Dtype::kFloat32, Dtype::kFloat32, cols,
                                    cols, &scale,  false};
    launched([&] { cuda::launch_philox_bits({w, nullptr}, 132, kStream); }, 0);
    launched([&] { cuda::launch_noise({w, nullptr}, 132, kStream); }, 0);
    launched([&] { cuda::launch_uniform({w, nullptr}, 132, kStream); }, 0);
    launched([&] { cuda::launch_perturb({args}, 132, kStream); }, 0);
    launched([&] { cuda::launch_restore({args}, 132, kStream); }, 0);
  }
}

// More than 2^31 elements: memory that is never touched costs nothing.
template <class T>
void check_last_block(void (*launcher)(const cuda::NoiseArgs&, int, cudaStream_t), int64_t rows,
                      int64_t cols, int64_t rows_of_block) {
  const Guarded all(rows * cols * sizeof(T), 0, true), few(rows_of_block * cols * sizeof(T));
  const int enough = 100000000;
  emulator::first_block = INT64_MAX;
  launched([&] { launcher({block_of(rows, cols, 0, 4), all.data()}, enough, kStream); }, 1);
  emulator::first_block = emulator::launches.back().grid - 1;
  launched([&] { launcher({block_of(rows, cols, 0, 4), all.data()}, enough, kStream); }, 1);
  emulator::first_block = 0;
  const cuda::Block last = block_of(rows_of_block, cols, rows - rows_of_block, 4);
  launched([&] { launcher({last, few.data()}, 1, kStream); }, 1);
  const int64_t skipped = (rows - rows_of_block) * cols;
  CHECK(memcmp(all.data() + skipped * sizeof(T), few.data(), rows_of_block * cols * sizeof(T)) == 0,
        "%s at element %ld", emulator::launches.back().kernel.c_str(), skipped);
}

void test_beyond_int32() {
  // A block has eight short units: four rows of two.
  check_last_block<float>(cuda::launch_noise, 600000, 4096, 4);
  check_last_block<int64_t>(cuda::launch_philox_bits, 1 << 27, 32, 8);
  for (const int64_t padding : {int64_t{1} << 30, (int64_t{1} << 30) + 1}) {
    Matrix big(Dtype::kBFloat16, 5, 1000, padding, 0, true), small(Dtype::kBFloat16, 5, 1000);
    small.fill(true, 5);
    big.copy_from(small);
    const std::vector<float> scales = scales_of(5, 0);
    const Case c = {Dtype::kBFloat16, Dtype::kBFloat16, false, false, 5, 1000, 0, 0, 0};
    run(c, args_of(c, big, big, scales.data()), 1);
    run(c, args_of(c, small, small, scales.data()), 1);
    CHECK(big.same_bits(small), "rows beyond 2^31 elements, stride %ld", big.stride);
  }
}

}  // namespace

int main() {
  test_words_and_normals();
  test_paths();
  test_perturb_and_restore();
  test_empty();
  test_beyond_int32();
  std::printf("%d failures\n", failures);
  return failures != 0;
}

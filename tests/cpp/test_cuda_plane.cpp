// perturb_plane's CUDA kernel, run on the host by cuda_emulator.h through its own launcher: against
// its meaning in float64, from the normals of launch_noise.
#include <cmath>

#include "../../csrc/cuda/launch.h"
#include "check.h"
#include "cuda_cases.h"

using namespace flatkern;
using namespace check;

namespace {

constexpr int64_t kOther[] = {7, 0xFFFFFFFF, 0, 0x80000001};

struct Case {
  Dtype dtype;
  int64_t rows, cols, padding;
  int shift;  // elements from a multiple of 16 bytes
  uint64_t col_offset;
  bool wild;
};

void run(const Case& c, const Matrix& weight, const Matrix& out, const float* first,
         const float* second, int sm_count) {
  const cuda::PlaneArgs args = {
      {block_of(c.rows, c.cols, 7, c.col_offset), weight.at(0, 0), out.at(0, 0), c.dtype, c.dtype,
       weight.stride, out.stride, first, false},
      kOther,
      second};
  launched([&] { cuda::launch_perturb_plane(args, sm_count, kStream); }, 1);
}

// Whether `got` may be w + e: e as far off as the noise, each sum rounded, and the result once
// more.
bool allowed(uint32_t got, uint32_t before, Dtype dtype, double e, double slack) {
  const float w = value_of(before, dtype);
  if (!is_finite(w)) return got == before;
  slack += 0x1p-22 * (std::fabs(w) + std::fabs(e)) + 0x1p-148;
  const float low = value_of(rounded(static_cast<float>(w + e - slack), dtype), dtype);
  const float high = value_of(rounded(static_cast<float>(w + e + slack), dtype), dtype);
  if (!is_finite(low) || !is_finite(high)) {
    return got == before || is_finite(value_of(got, dtype));
  }
  const float value = value_of(got, dtype);
  return low <= value && value <= high;
}

void check_case(const Case& c) {
  Matrix weight(c.dtype, c.rows, c.cols, c.padding, c.shift);
  weight.fill(c.wild, 11);
  const std::vector<float> first = scales_of(c.rows, c.cols), second = scales_of(c.rows, 3);
  cuda::Block other = block_of(c.rows, c.cols, 7, c.col_offset);
  const std::vector<float> z = noise_of(other, 132);
  other.key = kOther;
  const std::vector<float> y = noise_of(other, 132);
  Matrix out(c.dtype, c.rows, c.cols, c.padding, c.shift);
  run(c, weight, out, first.data(), second.data(), 132);
  int64_t wrong = 0, moved = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    const double a = usable_scale(first[i]), b = usable_scale(second[i]);
    for (int64_t j = 0; j < c.cols; ++j) {
      const int64_t at = i * c.cols + j;
      const double first_e = a * z[at], second_e = b * y[at];
      const double slack = 1e-5 * (std::fabs(a) + std::fabs(b));
      const uint32_t got = out.bits(i, j), before = weight.bits(i, j);
      // Products that float32 cannot hold may cancel in float64.
      const bool holds = std::fabs(first_e) < 0x1.FFp127 && std::fabs(second_e) < 0x1.FFp127;
      wrong +=
          !allowed(got, before, c.dtype, first_e + second_e, slack) && (holds || got != before);
      moved += out.bits(i, j) != weight.bits(i, j);
    }
  }
  CHECK(wrong == 0, "%ld wrong: %s, %ld columns, offset %lu, shift %d", wrong, name_of(c.dtype),
        c.cols, c.col_offset, c.shift);
  CHECK(c.rows < 17 || moved > 0, "nothing moved: %s", name_of(c.dtype));

  // Neither the grid, nor the path that an alignment takes, nor the place of the result matters.
  for (const int shift : {0, 1}) {
    Matrix there(c.dtype, c.rows, c.cols, 3, shift), again(c.dtype, c.rows, c.cols, 8, 0);
    there.copy_from(weight);
    run(c, there, again, first.data(), second.data(), 1);
    CHECK(again.same_bits(out), "%s, %ld columns, shift %d", name_of(c.dtype), c.cols, shift);
  }
  run(c, weight, weight, first.data(), second.data(), 2);
  CHECK(weight.same_bits(out), "in place, %s, %ld columns", name_of(c.dtype), c.cols);
}

void test_paths() {
  const auto vectors = [](int shift, int64_t padding, uint64_t offset) {
    Matrix weight(Dtype::kBFloat16, 2, 264, padding, shift), out(Dtype::kBFloat16, 2, 264);
    const std::vector<float> scales = scales_of(2, 0);
    const Case c = {weight.dtype, 2, 264, padding, shift, offset, false};
    run(c, weight, out, scales.data(), scales.data(), 1);
    return emulator::launches.back().kernel.find("true") != std::string::npos;
  };
  CHECK(vectors(0, 0, 0) && vectors(0, 8, 4), "aligned rows take vectors");
  CHECK(!vectors(1, 0, 0) && !vectors(0, 4, 0) && !vectors(0, 0, 2), "others do not");
}

}  // namespace

int main() {
  test_paths();
  for (const Dtype dtype : kDtypes) {
    for (const bool wild : {false, true}) {
      check_case({dtype, 17, 264, 0, 0, 0, wild});
      check_case({dtype, 17, 267, 5, 0, 12, wild});
      check_case({dtype, 17, 267, 0, 1, 3, wild});
    }
    for (const int64_t cols : {1, 3, 5, 8, 255, 4097, 8200}) {
      check_case({dtype, 3, cols, (8 - cols % 8) % 8, 0, (1ull << 34) - 12292, false});
      check_case({dtype, 3, cols, 0, 1, 2, false});
    }
  }
  const float scale = 1.0f;
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{0, 5}, {5, 0}}) {
    const cuda::PlaneArgs args = {{block_of(rows, cols, 0, 0), nullptr, nullptr, Dtype::kFloat32,
                                   Dtype::kFloat32, cols, cols, &scale, false},
                                  kOther,
                                  &scale};
    launched([&] { cuda::launch_perturb_plane(args, 132, kStream); }, 0);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}

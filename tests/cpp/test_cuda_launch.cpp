// Launch shapes and index arithmetic of the CUDA kernels, which are pure functions, and the
// emulator that runs the kernels in the other tests.
#include <algorithm>
#include <cmath>
#include <random>

#include "../../csrc/cuda/mma.h"
#include "cuda_cases.h"

using namespace flatkern;
using namespace flatkern::cuda;

namespace {

// A barrier, then a warp's sum: each thread's value comes from the thread opposite.
void emulated_kernel(double* out) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = blockIdx.x * 1000.0 + threadIdx.x;
  __syncthreads();
  double value = values[blockDim.x - 1 - threadIdx.x];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

void test_emulator() {
  std::vector<double> out(3 * 96);
  for (const bool reversed : {false, true}) {
    emulator::reversed = reversed;
    launched([&] { FLATKERN_LAUNCH(emulated_kernel, 3, 96, kStream, out.data()); }, 1);
    emulator::reversed = false;
    for (int i = 0; i < 3 * 96; ++i) {
      const int warp = i % 96 / kWarp, first = 96 - kWarp * (warp + 1);
      const double expected = kWarp * (i / 96 * 1000.0 + first) + kWarp * (kWarp - 1) / 2;
      CHECK(out[i] == expected, "thread %d: %g, not %g", i, out[i], expected);
    }
  }
}

// Fragments as the PTX ISA has them, from a lane and an index to a row and a column.
struct Fragments {
  float a[16][16], b[16][8], c[16][8];

  static int a_row(int lane, int i) { return lane / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8); }
  static int a_col(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8); }
  static int b_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8); }
  static int c_row(int lane, int i) { return lane / 4 + (i < 2 ? 0 : 8); }
  static int c_col(int lane, int i) { return lane % 4 * 2 + (i & 1); }
};

void mma_kernel(Fragments* f) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 8; i += 2) {
    a[i / 2] = pack(BFloat16{}, f->a[f->a_row(lane, i)][f->a_col(lane, i)],
                    f->a[f->a_row(lane, i + 1)][f->a_col(lane, i + 1)]);
  }
  for (int i = 0; i < 4; i += 2) {
    b[i / 2] =
        pack(BFloat16{}, f->b[f->b_row(lane, i)][lane / 4], f->b[f->b_row(lane, i + 1)][lane / 4]);
  }
  for (int i = 0; i < 4; ++i) c[i] = f->c[f->c_row(lane, i)][f->c_col(lane, i)];
  mma(c, a, b);
  mma(c, a, b);
  for (int i = 0; i < 4; ++i) f->c[f->c_row(lane, i)][f->c_col(lane, i)] = c[i];
}

// Small integers, so that the products are exact.
void test_emulated_mma() {
  std::mt19937 random(3);
  Fragments before;
  for (auto& row : before.a)
    for (float& x : row) x = static_cast<int>(random() % 200) - 100;
  for (auto& row : before.b)
    for (float& x : row) x = static_cast<int>(random() % 200) - 100;
  for (auto& row : before.c)
    for (float& x : row) x = static_cast<int>(random() % 2000) - 1000;
  Fragments after = before;
  launched([&] { FLATKERN_LAUNCH(mma_kernel, 1, kWarp, kStream, &after); }, 1);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float expected = before.c[i][j];
      for (int k = 0; k < 16; ++k) expected += 2 * before.a[i][k] * before.b[k][j];
      CHECK(after.c[i][j] == expected, "(%d, %d): %g, not %g", i, j, after.c[i][j], expected);
    }
  }
}

void test_split() {
  std::mt19937 random(4);
  for (int i = 0; i < 100000; ++i) {
    const float x = float_of_bits(random());
    // Beyond, parts are denormal or infinite.
    if (!(std::fabs(x) > 0x1p-109f && std::fabs(x) < 0x1.FEp127f)) continue;
    uint32_t part[3];
    split_pair(1.0f, x, part[0], part[1], part[2]);
    float one[3], parts[3];
    for (int k = 0; k < 3; ++k) unpack(BFloat16{}, part[k], one[k], parts[k]);
    CHECK(static_cast<double>(parts[0]) + parts[1] + parts[2] == x, "%a", x);
    CHECK(one[0] == 1.0f && one[1] == 0.0f && one[2] == 0.0f, "1 is one part");
  }
}

// What the wide loop takes by itself: all ordinary weights, nothing that is not finite.
template <class T>
void test_all_finite(std::initializer_list<float> ordinary) {
  std::mt19937 random(5);
  for (int i = 0; i < 20000; ++i) {
    float values[kVector];
    for (float& value : values) {
      const uint32_t draw = random();
      value = *(ordinary.begin() + draw % ordinary.size()) * (draw >> 31 ? 1.0f : -1.0f);
    }
    CHECK(all_finite(round_packed<T>(values)), "ordinary %d", i);
    for (int k = 0; k < kVector; ++k) {
      float spoiled[kVector];
      for (int j = 0; j < kVector; ++j) spoiled[j] = values[j];
      for (const float wild : {INFINITY, -INFINITY, NAN}) {
        spoiled[k] = wild;
        CHECK(!all_finite(round_packed<T>(spoiled)), "%g at %d of %d", wild, k, i);
      }
      // Another one that is not finite hides nothing.
      spoiled[random() % kVector] = random() % 2 ? INFINITY : -INFINITY;
      CHECK(!all_finite(round_packed<T>(spoiled)), "two, %d of %d", k, i);
    }
  }
}

void test_grids() {
  CHECK(divide_up(0, 8) == 0 && divide_up(1, 8) == 1 && divide_up(8, 8) == 1, "divide_up");
  for (const int log2 : {kShortUnitLog2, kLongUnitLog2}) {
    const int64_t width = int64_t{1} << log2;
    CHECK(units_per_row(1, log2) == 1 && units_per_row(width, log2) == 1, "one unit");
    CHECK(units_per_row(width + 1, log2) == 2, "two units");
    // Lanes count a unit's vectors in 32 bits, and start it with a whole step.
    CHECK(width % kWarpCols == 0 && width / kWarpCols < 32, "steps of a unit");
  }
  CHECK(units_per_row(1ll << 34, kLongUnitLog2) == 1 << 22, "units");
  // On 132 SMs: one layer, and the layers of a model.
  CHECK(unit_log2(4096, 132) == kShortUnitLog2 && unit_log2(11008, 132) == kShortUnitLog2, "few");
  CHECK(unit_log2(24 * 4096, 132) == kLongUnitLog2, "many");
  for (const int sm_count : {1, 2, 108, 132}) {
    for (const int64_t warps : {1ll, 7ll, 8ll, 9ll, 5000ll, 1ll << 40}) {
      const int64_t blocks = grid_blocks(warps, sm_count);
      CHECK(blocks >= 1 && blocks <= sm_count * kBlocksPerSm, "%ld blocks", blocks);
      CHECK(blocks * kWarpsPerBlock >= warps || blocks == sm_count * kBlocksPerSm, "too few");
      CHECK((blocks - 1) * kWarpsPerBlock < warps, "a block without work");
    }
  }
}

// Every column of every row is in one unit.
void test_units_cover() {
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{1, 1}, {7, 4096}, {5, 4097}, {3, 50000}, {100, 9000}}) {
    for (const int log2 : {kShortUnitLog2, kLongUnitLog2}) {
      int64_t row = 0, column = 0;
      for (uint64_t index = 0; row < rows; ++index) {
        const Unit unit = unit_of(rows, cols, log2, index);
        CHECK(unit.row == row && unit.begin == column && unit.end > column, "unit %lu", index);
        column = unit.end == cols ? 0 : unit.end;
        row += unit.end == cols;
        const int64_t units = rows * units_per_row(cols, log2);
        CHECK((row < rows) == (static_cast<int64_t>(index) + 1 < units), "all units");
      }
      for (const uint64_t past : {0ull, 1ull, 7ull, 1ull << 32}) {
        const Unit unit = unit_of(rows, cols, log2, rows * units_per_row(cols, log2) + past);
        CHECK(unit.row == rows, "past the last");
      }
    }
  }
}

// Against division in 64 bits, as far as weights may reach.
void test_units_far() {
  std::mt19937_64 random(1);
  const int64_t rows = (1ll << 32) - 1;
  for (int i = 0; i < 200000; ++i) {
    const int64_t cols = 1 + static_cast<int64_t>(random() % (1ull << (1 + random() % 34)));
    const uint64_t per_row = units_per_row(cols, kShortUnitLog2);
    const uint64_t index = random() % std::min<uint64_t>(rows * per_row, 1ull << 32);
    const Unit unit = unit_of(rows, cols, kShortUnitLog2, index);
    const int64_t begin = static_cast<int64_t>(index % per_row) << kShortUnitLog2;
    const bool right = unit.row == static_cast<int64_t>(index / per_row) && unit.begin == begin;
    CHECK(right && begin < unit.end && unit.end <= cols, "unit %lu of %lu", index, per_row);
  }
  // Indices that 32 bits would wrap around to the first rows.
  CHECK(unit_of(rows, 1, kLongUnitLog2, 1ull << 32).row == rows, "past 2^32");
}

void test_row_scales() {
  for (const float c : {NAN, INFINITY, -INFINITY}) {
    const RowScale scale = row_scale_of(c);
    CHECK(scale.scale == 0.0f && scale.after == 1.0f, "%g counts as 0", c);
  }
  CHECK(std::signbit(row_scale_of(-0.0f).scale), "the sign of zero");
  std::mt19937 random(2);
  for (int i = 0; i < 200000; ++i) {
    const float c = float_of_bits(random());
    if (!is_finite(c) || c == 0.0f) continue;
    const RowScale scale = row_scale_of(c);
    const double exact = 1.1774100225154747 * c,
                 got = static_cast<double>(scale.scale) * scale.after;
    CHECK(std::fabs(got / exact - 1) < 0x1p-23, "c = %a", c);
    // No radius overflows where c z might not, and none is denormal before it is shifted back.
    const float largest = scale.scale * 5.75f, smallest = scale.scale * 0x1p-13f;
    CHECK(is_finite(largest) && std::fabs(smallest) >= 0x1p-126f, "radii of c = %a", c);
    CHECK(scale.after == 1.0f || std::fabs(c) < 1e-30f || std::fabs(c) > 1e37f, "c = %a", c);
  }
}

void test_alignment() {
  const auto at = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  CHECK(is_vector_aligned(at(32), 8, Dtype::kBFloat16), "8 halves are 16 bytes");
  CHECK(is_vector_aligned(at(32), 4, Dtype::kFloat32), "4 floats are 16 bytes");
  CHECK(!is_vector_aligned(at(32), 4, Dtype::kFloat16), "4 halves are not");
  CHECK(!is_vector_aligned(at(40), 8, Dtype::kBFloat16), "the base counts too");
}

}  // namespace

int main() {
  test_emulator();
  test_emulated_mma();
  test_split();
  test_all_finite<float>({0.0f, 0x1p-149f, 0.05f, 3.4e38f});
  test_all_finite<BFloat16>({0.0f, 0x1p-133f, 0.05f, 1e18f});
  test_all_finite<Float16>({0.0f, 0x1p-24f, 0.05f, 250.0f});
  test_grids();
  test_units_cover();
  test_units_far();
  test_row_scales();
  test_alignment();
  std::printf("%d failures\n", check::failures);
  return check::failures != 0;
}

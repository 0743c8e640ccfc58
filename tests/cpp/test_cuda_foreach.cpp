// Launches of many tensors: which tensors share one, and that each gets the bits that a launch for
// it alone gives it.
#include <deque>

#include "../../csrc/cuda/launch.h"
#include "cuda_cases.h"

using namespace flatkern;
using namespace check;

namespace {

// Counts of blocks stand for tensors, their last digits for the kernels that they take.
std::vector<cuda::Table<uint32_t>> tables_of(const std::vector<uint32_t>& tensors) {
  return cuda::tables_of(
      tensors, [](uint32_t t) { return t % 10; }, [](uint32_t t) { return t / 10; });
}

void test_tables() {
  static_assert(sizeof(cuda::Table<cuda::PerturbArgs>) <= cuda::kParameterBytes);
  static_assert(sizeof(cuda::Table<cuda::RowNormArgs>) <= cuda::kParameterBytes);
  static_assert(cuda::Table<cuda::PerturbArgs>::kCapacity >= 40);
  static_assert(cuda::Table<cuda::RowNormArgs>::kCapacity >= 28);
  CHECK(tables_of({}).empty() && tables_of({1, 2, 3}).empty(), "nothing to do");

  // In order, the kernels by first use; 1 has no blocks.
  const auto mixed = tables_of({31, 42, 1, 11, 52, 93, 21});
  CHECK(mixed.size() == 3, "%zu tables", mixed.size());
  const std::vector<uint32_t> expected[] = {{31, 11, 21}, {42, 52}, {93}};
  for (size_t i = 0; i < mixed.size(); ++i) {
    CHECK(mixed[i].count == expected[i].size(), "%u tensors", mixed[i].count);
    for (uint32_t k = 0; k < mixed[i].count; ++k) {
      CHECK(mixed[i].tensors[k] == expected[i][k], "tensor %u of table %zu", k, i);
    }
  }
  CHECK(mixed[0].blocks() == 6 && mixed[1].blocks() == 9 && mixed[2].blocks() == 9, "blocks");

  // A table that is full, and one whose grid would be too large.
  constexpr size_t kCapacity = cuda::Table<uint32_t>::kCapacity;
  CHECK(tables_of(std::vector<uint32_t>(kCapacity, 10)).size() == 1, "full");
  CHECK(tables_of(std::vector<uint32_t>(kCapacity + 1, 10)).size() == 2, "overfull");
  struct Large {
    int64_t blocks;
  };
  const auto large = [](const std::vector<Large>& tensors) {
    const auto blocks = [](const Large& t) { return static_cast<uint32_t>(t.blocks); };
    return cuda::tables_of(tensors, [](const Large&) { return 0; }, blocks).size();
  };
  CHECK(large({{1 << 30}, {(1 << 30) - 1}}) == 1 && large({{1 << 30}, {1 << 30}}) == 2, "grids");
}

// Against a walk over all blocks.
void test_places() {
  std::mt19937 random(1);
  for (const size_t count : {1, 2, 3, 7, 64, 500}) {
    std::vector<uint32_t> tensors(count);
    for (uint32_t& t : tensors) t = 10 * (1 + random() % 40);
    const auto tables = tables_of(tensors);
    CHECK(tables.size() == 1, "%zu tables", tables.size());
    uint32_t block = 0;
    for (uint32_t t = 0; t < count; ++t) {
      for (uint32_t k = 0; k < tensors[t] / 10; ++k, ++block) {
        const cuda::Place place = cuda::place_of(tables[0], block);
        CHECK(place.tensor == t && place.block == k && place.blocks == tensors[t] / 10,
              "block %u of tensor %u of %zu", k, t, count);
      }
    }
    CHECK(tables[0].blocks() == block, "%u blocks", block);
  }
}

// Nothing is computed: how many launches there are.
template <class F>
void launches(const F& call, size_t count) {
  emulator::first_block = INT64_MAX;
  launched(call, count);
  emulator::first_block = 0;
}

// The linear layers of Llama-2-7B.
void test_launches_of_a_model() {
  std::vector<cuda::PerturbArgs> weights;
  std::vector<cuda::RowNormArgs> norms;
  for (int layer = 0; layer < 32; ++layer) {
    for (int linear = 0; linear < 7; ++linear) {
      const int64_t rows = linear == 4 || linear == 5 ? 11008 : 4096;
      const int64_t cols = linear == 6 ? 11008 : 4096;
      cuda::PerturbArgs args{};
      args.block = block_of(rows, cols, 0, 0);
      args.weight_dtype = args.out_dtype = Dtype::kBFloat16;
      args.weight_stride = args.out_stride = cols;
      weights.push_back(args);
      cuda::RowNormArgs norm{};
      norm.rows = rows, norm.cols = cols, norm.rank = 8;
      norm.weight_dtype = Dtype::kBFloat16;
      norm.weight_stride = cols;
      norms.push_back(norm);
    }
  }
  launches([&] { cuda::launch_perturb(weights, 132, kStream); }, 6);
  launches([&] { cuda::launch_restore(weights, 132, kStream); }, 6);
  for (const int64_t rank : {8, 64}) {
    for (cuda::RowNormArgs& norm : norms) norm.rank = rank;
    // One launch prepares all tensors of the next, and one scratch serves them all.
    launches([&] { cuda::launch_row_norm(norms, nullptr, kStream); }, 16);
    CHECK(cuda::row_norm_scratch(norms) < 150 << 20, "%ld", cuda::row_norm_scratch(norms));
  }
}

// Tensors of all dtypes, aligned or not, of one or many blocks; more than fit one table.
struct Weights {
  std::deque<Matrix> matrices;
  std::deque<std::vector<float>> scales;
  std::vector<cuda::PerturbArgs> args;

  explicit Weights(bool elementwise) {
    for (int i = 0; i < 150; ++i) {
      const Dtype dtype = kDtypes[i % 4 % 3];
      const int64_t rows = i % 7, cols = i == 60 ? 4200 : 1 + i * 37 % 300;
      if (rows == 0) continue;
      const int64_t padding = i % 2 == 0 ? (8 - cols % 8) % 8 : i % 5;
      Matrix& weight = matrices.emplace_back(dtype, rows, cols, padding, i % 3 == 1);
      weight.fill(i % 2 == 0, i);
      scales.push_back(scales_of(rows, i));
      args.push_back({block_of(rows, cols, 100 * i, 8 * i + i % 3), weight.at(0, 0),
                      weight.at(0, 0), dtype, dtype, weight.stride, weight.stride,
                      scales.back().data(), elementwise});
    }
  }
};

void test_perturb_and_restore() {
  for (const bool elementwise : {false, true}) {
    for (const bool restore : {false, true}) {
      const auto launcher = restore ? cuda::launch_restore : cuda::launch_perturb;
      for (const int sm_count : {1, 132}) {
        const Weights one_by_one(elementwise), together(elementwise);
        for (const cuda::PerturbArgs& args : one_by_one.args) launcher({args}, 132, kStream);
        emulator::launches.clear();
        launcher(together.args, sm_count, kStream);
        CHECK(emulator::launches.size() <= 8, "%zu launches", emulator::launches.size());
        for (size_t i = 0; i < together.args.size(); ++i) {
          CHECK(together.matrices[i].same_bits(one_by_one.matrices[i]), "tensor %zu, %d SMs", i,
                sm_count);
        }
      }
    }
  }
}

void test_row_norm() {
  std::deque<Problem> problems;
  for (int i = 0; i < 110; ++i) {
    const int64_t ranks[] = {0, 3, 8, 20};
    problems.emplace_back(kDtypes[i % 3], 1 + i % 7, 1 + i * 37 % 300, ranks[i % 4], i % 5, i % 2);
  }
  std::vector<std::vector<float>> once, together;
  std::vector<cuda::RowNormArgs> args;
  for (const Problem& p : problems) {
    once.emplace_back(p.weight.rows);
    together.emplace_back(p.weight.rows);
    args.push_back(p.args(together.back().data()));
    run_row_norm({p.args(once.back().data())});
  }
  emulator::launches.clear();
  run_row_norm(args);
  // Three dtypes, aligned or not, ranks 0, up to 16, up to 32: each prepared and run.
  CHECK(emulator::launches.size() <= 36, "%zu launches", emulator::launches.size());
  for (size_t i = 0; i < args.size(); ++i) {
    CHECK(memcmp(once[i].data(), together[i].data(), 4 * once[i].size()) == 0,
          "norms of tensor %zu, rank %ld", i, problems[i].rank);
  }
}

}  // namespace

int main() {
  test_tables();
  test_places();
  test_launches_of_a_model();
  test_perturb_and_restore();
  test_row_norm();
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// Every instruction set gives the bits of the portable kernels, compiled here with fused
// multiply-add as the others are.
#include <cmath>

#include "cpu_cases.h"

namespace flatkern::cpu {
namespace {

constexpr int64_t kColumns[] = {1, 3, 4, 7, 31, 32, 33, 63, 64, 65, 1000, 4095, 4096, 4099, 8200};
constexpr uint64_t kColumnOffsets[] = {0, 1, 2, 3, 6, (1ull << 33) + 5};
constexpr int64_t kRows = 7;

void expect(bool ok, const char* what, const char* isa, int64_t cols) {
  CHECK(ok, "%s, %s, %ld columns", what, isa, static_cast<long>(cols));
}

Block block_of(int64_t cols, uint64_t col_offset) { return {kKey, kRows, cols, 7, col_offset}; }
int64_t units(int64_t cols) { return kRows * blocks_per_row(cols); }

std::vector<float> noise_of(const Kernels& k, int64_t cols, uint64_t col_offset) {
  std::vector<float> out(kRows * cols);
  on_threads(k.noise, {block_of(cols, col_offset), out.data()}, units(cols));
  return out;
}

std::vector<float> uniform_of(const Kernels& k, int64_t cols, uint64_t col_offset) {
  std::vector<float> out(kRows * cols);
  on_threads(k.uniform, {block_of(cols, col_offset), out.data()}, units(cols));
  return out;
}

std::vector<char> perturbed(const Kernels& k, bool restore, std::vector<char> weight, Dtype from,
                            Dtype to, int64_t cols, bool elementwise) {
  std::vector<float> scale = {0.5f, 1e-3f, 0.0f, -0.0f, NAN, INFINITY, 3e38f};
  std::vector<char> out(kRows * cols * size_of(to));
  const PerturbArgs args = {block_of(cols, 2), weight.data(), out.data(), from, to, cols, cols,
                            scale.data(),      elementwise};
  on_threads(restore ? k.restore : k.perturb, args, units(cols));
  return out;
}

struct Adapters {
  int64_t rank, stride;
  std::vector<float> lora_A, lora_B;
};

Adapters adapters_of(int64_t cols, int64_t rank) {
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  Adapters a{rank, (cols + kNormLanes - 1) / kNormLanes * kNormLanes, {}, {}};
  a.lora_A.assign(rank * a.stride, 0.0f);
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t j = 0; j < cols; ++j) a.lora_A[k * a.stride + j] = normal(generator);
  }
  for (int64_t i = 0; i < kRows * rank; ++i) a.lora_B.push_back(normal(generator));
  return a;
}

RowNormArgs norm_args(const std::vector<char>& weight, Dtype dtype, int64_t cols, const Adapters& a,
                      std::vector<float>& norm, float relative_scale = 1.0f) {
  return {kRows,           cols,     a.rank,          weight.data(),  dtype,      cols,
          a.lora_A.data(), a.stride, a.lora_B.data(), relative_scale, norm.data()};
}

std::vector<float> norms(const Kernels& k, const std::vector<char>& weight, Dtype dtype,
                         int64_t cols, const Adapters& a) {
  std::vector<float> norm(kRows);
  on_threads(k.row_norm, norm_args(weight, dtype, cols, a, norm), kRows);
  return norm;
}

// The fused op against its parts, on the same kernels.
void check_merged(const Kernels& k, const std::vector<char>& weight, Dtype dtype, int64_t cols,
                  const Adapters& a) {
  std::vector<float> scale = norms(k, weight, dtype, cols, a), returned(kRows);
  for (float& s : scale) s *= 0.01f;
  std::vector<char> parts(weight.size()), fused = weight;
  PerturbArgs args = {block_of(cols, 0), weight.data(), parts.data(), dtype, dtype, cols, cols,
                      scale.data(),      false};
  on_threads(k.perturb, args, units(cols));
  args.weight = args.out = fused.data();
  args.row_scale = nullptr;
  on_threads(k.perturb_merged, {args, norm_args(weight, dtype, cols, a, returned, 0.01f)}, kRows);
  expect(fused == parts && returned == scale, "perturb_merged", k.name, cols);
}

void compare(const Kernels& k, const Kernels& base) {
  for (const int64_t cols : kColumns) {
    for (const uint64_t offset : kColumnOffsets) {
      expect(noise_of(k, cols, offset) == noise_of(base, cols, offset), "noise", k.name, cols);
      expect(uniform_of(k, cols, offset) == uniform_of(base, cols, offset), "uniform", k.name,
             cols);
    }
    for (const Dtype from : kDtypes) {
      const auto wild = random_weights(kRows * cols, from, true, 1);
      const auto tame = random_weights(kRows * cols, from, false, 2);
      for (const bool elementwise : {false, true}) {
        for (const Dtype to : kDtypes) {
          const auto run = [&](const Kernels& kernels, const std::vector<char>& weight) {
            return perturbed(kernels, false, weight, from, to, cols, elementwise);
          };
          expect(run(k, wild) == run(base, wild), "perturb, wild", k.name, cols);
          expect(run(k, tame) == run(base, tame), "perturb, tame", k.name, cols);
        }
        const auto run = [&](const Kernels& kernels) {
          return perturbed(kernels, true, wild, from, from, cols, elementwise);
        };
        expect(run(k) == run(base), "restore", k.name, cols);
      }
      const Adapters a = adapters_of(cols, 5);
      expect(norms(k, tame, from, cols, a) == norms(base, tame, from, cols, a), "row_norm", k.name,
             cols);
      check_merged(k, tame, from, cols, a);
    }
  }
}

int test() {
  const std::vector<const Kernels*> all = kernels_here();
  for (const Kernels* k : all) {
    compare(*k, *all[0]);
    std::printf("%s ", k->name);
  }
  std::printf(": %d failures\n", check::failures);
  return check::failures != 0;
}

}  // namespace
}  // namespace flatkern::cpu

int main() { return flatkern::cpu::test(); }

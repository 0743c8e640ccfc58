// Every instruction set gives the bits of the portable kernels, compiled here with fused
// multiply-add as the others are.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "on_threads.h"

namespace flatkern::cpu {
namespace {

constexpr NoiseKey kKey = {0x01234567u, 0x89ABCDEFu, 5u, 0xFFFFFFFFu};
constexpr int64_t kColumns[] = {1, 3, 4, 7, 31, 32, 33, 63, 64, 65, 1000, 4095, 4096, 4099, 8200};
constexpr uint64_t kColumnOffsets[] = {0, 1, 2, 3, 6, (1ull << 33) + 5};
constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
constexpr int64_t kRows = 7;

int failures = 0;

void expect(bool ok, const char* what, const char* isa, int64_t cols) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s, %s, %ld columns\n", what, isa, static_cast<long>(cols));
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Random bit patterns: NaN, infinities and denormals among them, unless tame.
std::vector<char> random_weights(int64_t count, Dtype dtype, bool tame, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<char> bytes(count * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) {
    char* p = bytes.data() + i * size_of(dtype);
    const uint32_t bits = tame ? bits_of_float(normal(generator)) : generator();
    if (dtype == Dtype::kFloat32) {
      memcpy(p, &bits, 4);
    } else if (tame) {
      const uint16_t half = dtype == Dtype::kBFloat16 ? round_to<BFloat16>(float_of_bits(bits)).bits
                                                      : round_to<Float16>(float_of_bits(bits)).bits;
      memcpy(p, &half, 2);
    } else {
      memcpy(p, &bits, 2);
    }
  }
  return bytes;
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
      const auto wild = random_weights(kRows * cols, from, false, 1);
      const auto tame = random_weights(kRows * cols, from, true, 2);
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
  const Kernels& base = *portable_kernels();
  compare(base, base);
  std::printf("portable");
#ifdef FLATKERN_MULTI_ISA
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512vl");
  if (avx2) compare(*avx2_kernels(), base);
  if (avx2) std::printf(" avx2");
  if (avx512) compare(*avx512_kernels(), base);
  if (avx512) std::printf(" avx512");
#endif
  std::printf(": %d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace flatkern::cpu

int main() { return flatkern::cpu::test(); }

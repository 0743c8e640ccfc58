// Residuals of every instruction set: exact restores, the bits of the portable kernels, and a
// decoder that takes any bytes. Built with sanitizers, it sees reads and writes out of bounds.
#include "cpu_cases.h"

// Damaged residuals of each kind: `make sanitize` asks for more.
#ifndef FLATKERN_TEST_DAMAGED
#define FLATKERN_TEST_DAMAGED 20
#endif

namespace flatkern::cpu {
namespace {

struct Shape {
  int64_t rows, cols;
};
// Chunks of several rows, of one, and of a part of one; the last has several chunks a row.
constexpr Shape kShapes[] = {{1, 1}, {7, 33}, {260, 64}, {3, 4096}, {2, 9001}};

void expect(bool ok, const char* what, const char* isa, Shape shape) {
  CHECK(ok, "%s, %s, %ld x %ld", what, isa, static_cast<long>(shape.rows),
        static_cast<long>(shape.cols));
}

// A weight with the residual of its perturbation. The buffers end where their elements end.
struct Perturbed {
  Shape shape;
  Dtype dtype;
  bool elementwise;
  std::vector<char> weight;
  std::vector<float> scale;
  std::vector<uint32_t> directory, pool;
  std::atomic<uint64_t> asked{0};
  std::atomic<uint32_t> left_out{0};

  Perturbed(Shape shape, Dtype dtype, bool elementwise, bool wild, uint64_t capacity)
      : shape(shape),
        dtype(dtype),
        elementwise(elementwise),
        weight(random_weights(shape.rows * shape.cols, dtype, wild, 7, 0.05f)),
        scale(shape.rows, 0.003f),
        directory(chunks().count(), 0xFFFFFFFFu),
        pool(capacity) {}
  Perturbed(const Perturbed& x)
      : shape(x.shape),
        dtype(x.dtype),
        elementwise(x.elementwise),
        weight(x.weight),
        scale(x.scale),
        directory(x.directory),
        pool(x.pool) {}

  Chunks chunks() const { return {shape.rows, shape.cols}; }
  void run(void (*kernel)(const ResidualArgs&, int64_t, int64_t)) {
    const Block block = {kKey, shape.rows, shape.cols, 7, 2};
    const PerturbArgs perturb = {block,      weight.data(), weight.data(), dtype,      dtype,
                                 shape.cols, shape.cols,    scale.data(),  elementwise};
    on_threads(kernel,
               {perturb, chunks(), directory.data(), pool.data(), pool.size(), &asked, &left_out},
               chunks().count());
  }
};

// All that a raw chunk can need, and some.
uint64_t enough(Shape shape) { return 2 * shape.rows * shape.cols + 64; }

void compare(const Kernels& k, const Kernels& base, Shape shape, Dtype dtype, bool elementwise,
             bool wild) {
  Perturbed ours(shape, dtype, elementwise, wild, enough(shape));
  Perturbed theirs = ours;
  const std::vector<char> before = ours.weight;
  ours.run(k.perturb_residual);
  theirs.run(base.perturb_residual);
  expect(ours.weight == theirs.weight, "noisy weights", k.name, shape);
  expect(ours.asked == theirs.asked && ours.left_out == 0, "size", k.name, shape);
  const Perturbed filled = ours;
  ours.run(k.restore_residual);
  expect(ours.weight == before && ours.left_out == 0, "restore", k.name, shape);

  // No room for the last chunk: it keeps its weights, and the others come back.
  Perturbed tight(shape, dtype, elementwise, wild, filled.pool.size());
  tight.pool.resize(static_cast<size_t>(theirs.asked - 1));
  tight.run(k.perturb_residual);
  expect(tight.left_out > 0, "a full pool", k.name, shape);
  tight.left_out = 0;
  tight.run(k.restore_residual);
  expect(tight.weight == before && tight.left_out == 0, "restore from a full pool", k.name, shape);
}

// Restores of what was damaged: whatever comes out, nothing else is read or written.
void damage(const Kernels& k, Shape shape, Dtype dtype, bool elementwise) {
  std::mt19937 generator(11);
  Perturbed filled(shape, dtype, elementwise, false, enough(shape));
  filled.run(k.perturb_residual);
  filled.pool.resize(static_cast<size_t>(filled.asked));
  for (int round = 0; round < FLATKERN_TEST_DAMAGED; ++round) {
    Perturbed damaged = filled;
    for (unsigned n = 1 + generator() % 4; n != 0; --n) {
      // The directory and a payload's first words decide what is read.
      auto& words = generator() % 2 ? damaged.directory : damaged.pool;
      const size_t place = generator() % 2 ? generator() % words.size() : 0;
      words[place] = generator() % 2 ? generator() : words[place] ^ 1u << generator() % 32;
    }
    if (generator() % 4 == 0) damaged.pool.resize(1 + generator() % damaged.pool.size());
    damaged.run(k.restore_residual);
  }
}

int test() {
  const std::vector<const Kernels*> all = kernels_here();
  int64_t damaged = 0;
  for (const Kernels* k : all) {
    for (const Shape shape : kShapes) {
      for (const Dtype dtype : kDtypes) {
        for (const bool elementwise : {false, true}) {
          for (const bool wild : {false, true})
            compare(*k, *all[0], shape, dtype, elementwise, wild);
          damage(*k, shape, dtype, elementwise);
          damaged += FLATKERN_TEST_DAMAGED;
        }
      }
    }
    std::printf("%s ", k->name);
  }
  std::printf(": %ld damaged residuals, %d failures\n", static_cast<long>(damaged),
              check::failures);
  return check::failures != 0;
}

}  // namespace
}  // namespace flatkern::cpu

int main() { return flatkern::cpu::test(); }

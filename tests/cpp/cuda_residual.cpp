// The CUDA kernels of the residual on the host, for tests/csrc/test_cuda_residual.py: residuals'
// bytes lie between guards while the kernels run.
#include <deque>

#include "check.h"
#include "cuda_cases.h"

using namespace flatkern;

// As Tensor in the test.
struct Tensor {
  void* weight;
  int64_t dtype, rows, cols, stride;
  const float* row_scale;
  const int64_t* key;
  int64_t elementwise, row_offset, col_offset;
  void* residual;
  int64_t bytes;
  uint64_t implementation;
};

// op: 0 perturb, 1 perturb with residuals, 2 restore with them. Returns the failed checks, one of
// which is that there are so many launches.
extern "C" int run_emulated(int op, bool reversed, const Tensor* tensors, int count, int launches) {
  check::failures = 0;
  emulator::reversed = reversed;
  std::deque<check::Guarded> guarded;
  std::vector<cuda::PerturbArgs> plain;
  std::vector<cuda::ResidualArgs> all;
  for (const Tensor* t = tensors; t < tensors + count; ++t) {
    const Dtype type = static_cast<Dtype>(t->dtype);
    plain.push_back({{t->key, t->rows, t->cols, static_cast<uint64_t>(t->row_offset),
                      static_cast<uint64_t>(t->col_offset)},
                     t->weight,
                     t->weight,
                     type,
                     type,
                     t->stride,
                     t->stride,
                     t->row_scale,
                     t->elementwise != 0});
    char* bytes = guarded.emplace_back(t->bytes).data();
    memcpy(bytes, t->residual, t->bytes);
    const Chunks chunks{t->rows, t->cols};
    const int64_t pool = kResidualHeader + chunks.directory_bytes();
    all.push_back({plain.back(), reinterpret_cast<ResidualHeader*>(bytes),
                   reinterpret_cast<uint32_t*>(bytes + pool),
                   static_cast<uint64_t>(t->bytes - pool) / 4, t->implementation,
                   cuda::chunk_finder(chunks)});
  }
  launched(
      [&] {
        if (op == 0) cuda::launch_perturb(plain, 4, kStream);
        if (op == 1) cuda::launch_perturb_residual(all, 4, kStream);
        if (op == 2) cuda::launch_restore_residual(all, 4, kStream);
      },
      static_cast<size_t>(launches));
  for (int i = 0; i < count; ++i) {
    memcpy(tensors[i].residual, guarded[i].data(), tensors[i].bytes);
  }
  guarded.clear();
  emulator::reversed = false;
  return check::failures;
}

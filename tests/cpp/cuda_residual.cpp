// The CUDA kernels of the residual on the host, for tests/test_cuda_residual.py: a residual's bytes
// lie between guards while the kernels run.
#include "check.h"
#include "cuda_cases.h"

using namespace flatkern;

// op: 0 perturb, 1 perturb with a residual, 2 restore with it. Returns the failed checks.
extern "C" int run_emulated(int op, bool reversed, void* weight, int dtype, int64_t rows,
                            int64_t cols, int64_t stride, const float* row_scale,
                            const int64_t* key, bool elementwise, int64_t row_offset,
                            int64_t col_offset, void* residual, int64_t bytes,
                            uint64_t implementation) {
  const Dtype type = static_cast<Dtype>(dtype);
  const cuda::PerturbArgs perturb = {
      {key, rows, cols, static_cast<uint64_t>(row_offset), static_cast<uint64_t>(col_offset)},
      weight,
      weight,
      type,
      type,
      stride,
      stride,
      row_scale,
      elementwise};
  check::failures = 0;
  emulator::reversed = reversed;
  if (op == 0) {
    cuda::launch_perturb({perturb}, 4, kStream);
  } else {
    const check::Guarded guarded(bytes);
    memcpy(guarded.data(), residual, bytes);
    const Chunks chunks{rows, cols};
    const int64_t pool = kResidualHeader + chunks.directory_bytes();
    const cuda::ResidualArgs args = {perturb,
                                     chunks,
                                     reinterpret_cast<ResidualHeader*>(guarded.data()),
                                     reinterpret_cast<uint32_t*>(guarded.data() + kResidualHeader),
                                     reinterpret_cast<uint32_t*>(guarded.data() + pool),
                                     static_cast<uint64_t>(bytes - pool) / 4,
                                     implementation};
    const auto launcher = op == 1 ? cuda::launch_perturb_residual : cuda::launch_restore_residual;
    launched([&] { launcher(args, 4, kStream); }, 1 + (chunks.count() != 0));
    memcpy(residual, guarded.data(), bytes);
  }
  emulator::reversed = false;
  return check::failures;
}

// The residual's header on the device.
#include "residual.h"

namespace flatkern::cuda {

// A block a tensor: summing up the row scale takes longest.
__global__ void __launch_bounds__(kBeginThreads)
    perturb_residual_begin_kernel(const __grid_constant__ Table<ResidualArgs> table, bool restore) {
  __shared__ uint64_t partial[kBeginThreads];
  const ResidualArgs& args = table.tensors[blockIdx.x];
  const PerturbArgs& perturb = args.perturb;
  const Block& block = perturb.block;
  uint64_t sum = 0;
  for (int64_t i = threadIdx.x; i < block.rows; i += kBeginThreads) {
    sum += mixed_scale(perturb.row_scale[i], i);
  }
  partial[threadIdx.x] = sum;
  for (int half = kBeginThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x != 0) return;
  const ResidualHeader now =
      header_of(perturb, load_key(block.key), partial[0], args.implementation, args.capacity);
  const uint32_t refused = refusal_of(now, *args.header, restore);
  if (refused != 0) {
    args.header->refused = refused;
  } else {
    begin(*args.header, now, restore);
  }
}

void launch_residual_begin(const std::vector<ResidualArgs>& tensors, bool restore,
                           cudaStream_t stream) {
  const auto one = [](const ResidualArgs&) { return 1u; };
  for (const Table<ResidualArgs>& table : tables_of(tensors, one, one)) {
    FLATKERN_LAUNCH(perturb_residual_begin_kernel, static_cast<int>(table.count), kBeginThreads,
                    stream, table, restore);
  }
}

}  // namespace flatkern::cuda

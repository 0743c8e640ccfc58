// The residual's header on the device: what it was filled for, and the refusals.
#include "residual.h"

namespace flatkern::cuda {

// A sum over the row scale's bits, each mixed with its position, modulo 2^64: _residual._digest.
__device__ __forceinline__ uint64_t mixed_scale(const float* row_scale, int64_t row) {
  uint64_t x = static_cast<uint64_t>(row + 1) * 0x1E3779B97F4A7C15u;
  x += static_cast<int64_t>(static_cast<int32_t>(bits_of_float(row_scale[row])));
  x *= 0x3F58476D1CE4E5B9u;
  return x ^ static_cast<uint64_t>(static_cast<int64_t>(x) >> 31);
}

// Why the call must write nothing: bits of Refusal.
FLATKERN_HD uint32_t refusal_of(const ResidualHeader& now, const ResidualHeader& then,
                                bool restore) {
  const auto differs = [](bool equal, Refusal why) -> uint32_t { return equal ? 0u : why; };
  if (now.magic != then.magic || now.version != then.version) return kOtherBytes;
  if (now.dtype != then.dtype || now.rows != then.rows || now.cols != then.cols ||
      now.capacity != then.capacity) {
    return kOtherWeight;
  }
  if (!restore) return differs(then.state == kEmpty, kAlreadyFilled);
  if (then.state != kFilled) return kNotFilled;
  return differs(now.implementation == then.implementation, kOtherImplementation) |
         differs(now.elementwise == then.elementwise, kOtherElementwise) |
         differs(now.row_offset == then.row_offset, kOtherRowOffset) |
         differs(now.col_offset == then.col_offset, kOtherColOffset) |
         differs(now.seed == then.seed, kOtherSeed) | differs(now.step == then.step, kOtherStep) |
         differs(now.draw == then.draw, kOtherDraw) |
         differs(now.tensor == then.tensor, kOtherTensor) |
         differs(now.row_scale == then.row_scale, kOtherRowScale);
}

// A block a tensor: summing up the row scale takes longest. A restored residual counts as empty
// until a chunk says that it was refused.
__global__ void __launch_bounds__(kBeginThreads)
    perturb_residual_begin_kernel(const __grid_constant__ Table<ResidualArgs> table, bool restore) {
  __shared__ uint64_t partial[kBeginThreads];
  const ResidualArgs& args = table.tensors[blockIdx.x];
  const PerturbArgs& perturb = args.perturb;
  const Window& window = perturb.window;
  uint64_t sum = 0;
  for (int64_t i = threadIdx.x; i < window.rows; i += kBeginThreads) {
    sum += mixed_scale(perturb.row_scale, i);
  }
  partial[threadIdx.x] = sum;
  for (int half = kBeginThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x != 0) return;
  const NoiseKey key = load_key(window.key);
  ResidualHeader now = {};
  now.magic = kResidualMagic;
  now.version = kResidualVersion;
  now.dtype = static_cast<uint8_t>(perturb.weight_dtype);
  now.elementwise = perturb.elementwise;
  now.rows = static_cast<uint64_t>(window.rows);
  // A weight without rows has no columns either: _residual.layout_of.
  now.cols = window.rows == 0 ? 0 : static_cast<uint64_t>(window.cols);
  now.row_offset = window.row_offset;
  now.col_offset = window.col_offset;
  now.seed = key.seed;
  now.step = key.step;
  now.draw = key.draw;
  now.tensor = key.tensor;
  now.implementation = args.implementation;
  now.row_scale = partial[0] * 0x9E3779B97F4A7C15u;
  now.capacity = args.capacity;
  const uint32_t refused = refusal_of(now, *args.header, restore);
  if (refused != 0) {
    args.header->refused = refused;
  } else if (restore) {
    args.header->mismatched = 0;
    args.header->refused = 0;
    args.header->state = kEmpty;
  } else {
    now.state = kFilled;
    *args.header = now;
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

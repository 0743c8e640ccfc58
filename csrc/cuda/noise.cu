// Philox words, normals and uniform values as tensors.
#include "device.h"

namespace flatkern::cuda {

// The four values of a group of columns.
struct NormalGroup {
  FLATKERN_HD void operator()(const PhiloxRow& row, uint32_t group, float* z) const {
    scaled_group(row, group, kRadiusOfRoot, z);
  }
};
struct UniformGroup {
  FLATKERN_HD void operator()(const PhiloxRow& row, uint32_t group, float* u) const {
    const Words words = philox_group(row, group);
    for (int k = 0; k < 4; ++k) u[k] = unit_uniform(words.w[k]);
  }
};

// A thread takes one group of columns at a time; group(row, number, values) makes its four values.
// Aligned: rows hold whole groups, 16-byte aligned.
template <bool Aligned, class Group>
__device__ __forceinline__ void fill_groups(const NoiseArgs& args, int unit_log2,
                                            const Group& group) {
  const Block& block = args.block;
  const auto [i, begin, end] = unit_of_warp(block, unit_log2, blockIdx.x);
  if (i >= block.rows) return;
  const PhiloxRow row =
      philox_row(load_key(block.key), static_cast<uint32_t>(block.row_offset + i));
  float* out = static_cast<float*>(args.out) + i * block.cols;
  const int64_t misfit = static_cast<int64_t>((block.col_offset + begin) % 4);
  for (int64_t j = begin - misfit + 4 * (threadIdx.x % kWarp); j < end; j += 4 * kWarp) {
    float z[4];
    group(row, static_cast<uint32_t>((block.col_offset + j) / 4), z);
    if constexpr (Aligned) {
      Bits128 bits;
      for (int k = 0; k < 4; ++k) bits.w[k] = bits_of_float(z[k]);
      store_bits(out + j, bits);
    } else {
      for (int k = 0; k < 4; ++k) {
        if (j + k >= begin && j + k < end) out[j + k] = z[k];
      }
    }
  }
}

template <bool Aligned>
__global__ void __launch_bounds__(kThreads) noise_kernel(NoiseArgs args, int unit_log2) {
  fill_groups<Aligned>(args, unit_log2, NormalGroup{});
}

template <bool Aligned>
__global__ void __launch_bounds__(kThreads) uniform_kernel(NoiseArgs args, int unit_log2) {
  fill_groups<Aligned>(args, unit_log2, UniformGroup{});
}

__global__ void __launch_bounds__(kThreads) philox_bits_kernel(NoiseArgs args) {
  const Block& block = args.block;
  const NoiseKey key = load_key(block.key);
  const int64_t count = block.rows * block.cols;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; index < count; index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint64_t column = block.col_offset + index % block.cols;
    const uint32_t i = static_cast<uint32_t>(block.row_offset + index / block.cols);
    const Words words = philox4x32<>({{i, static_cast<uint32_t>(column / 4), key.tensor, key.draw}},
                                     key.seed, key.step);
    const int lane = static_cast<int>(column % 4);
    // Chosen by comparison: an index into registers would go through local memory.
    const uint32_t low = lane == 0 ? words.w[0] : words.w[1];
    const uint32_t high = lane == 2 ? words.w[2] : words.w[3];
    static_cast<int64_t*>(args.out)[index] = lane < 2 ? low : high;
  }
}

// Whether rows hold whole groups of columns.
static bool is_grouped(const Block& block) {
  return block.cols % 4 == 0 && block.col_offset % 4 == 0;
}

void launch_noise(const NoiseArgs& args, int sm_count, cudaStream_t stream) {
  const UnitGrid grid = unit_grid(args.block.rows, args.block.cols, sm_count);
  if (grid.blocks == 0) return;
  if (is_grouped(args.block)) {
    FLATKERN_LAUNCH((noise_kernel<true>), grid.blocks, kThreads, stream, args, grid.log2);
  } else {
    FLATKERN_LAUNCH((noise_kernel<false>), grid.blocks, kThreads, stream, args, grid.log2);
  }
}

void launch_uniform(const NoiseArgs& args, int sm_count, cudaStream_t stream) {
  const UnitGrid grid = unit_grid(args.block.rows, args.block.cols, sm_count);
  if (grid.blocks == 0) return;
  if (is_grouped(args.block)) {
    FLATKERN_LAUNCH((uniform_kernel<true>), grid.blocks, kThreads, stream, args, grid.log2);
  } else {
    FLATKERN_LAUNCH((uniform_kernel<false>), grid.blocks, kThreads, stream, args, grid.log2);
  }
}

void launch_philox_bits(const NoiseArgs& args, int sm_count, cudaStream_t stream) {
  if (args.block.rows == 0 || args.block.cols == 0) return;
  const int64_t warps = divide_up(args.block.rows * args.block.cols, kWarp);
  FLATKERN_LAUNCH(philox_bits_kernel, grid_blocks(warps, sm_count), kThreads, stream, args);
}

}  // namespace flatkern::cuda

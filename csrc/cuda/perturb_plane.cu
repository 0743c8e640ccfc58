// W + c z + d y: a warp per row and unit of columns; two noises are made for every element.
#include "perturb.h"

namespace flatkern::cuda {

// e of the four columns of a group.
struct PlaneRow {
  PhiloxRow first, second;
  RowScale c, d;

  __device__ __forceinline__ PlaneRow(const PlaneArgs& args, int64_t i) {
    const Block& block = args.perturb.block;
    const uint32_t row = static_cast<uint32_t>(block.row_offset + i);
    first = philox_row(load_key(block.key), row);
    second = philox_row(load_key(args.key), row);
    c = row_scale_of(args.perturb.row_scale[i]);
    d = row_scale_of(args.row_scale[i]);
  }
  __device__ __forceinline__ void group(uint32_t group, float* e) const {
    float other[4];
    scaled_group(first, group, c.scale, e);
    scaled_group(second, group, d.scale, other);
#pragma unroll
    for (int k = 0; k < 4; ++k) e[k] = e[k] * c.after + other[k] * d.after;
  }
};

// Vectors: rows are 16-byte aligned and start on a group.
template <class T, bool Vectors>
__global__ void __launch_bounds__(kThreads)
    perturb_plane_kernel(const __grid_constant__ PlaneArgs args, int unit_log2) {
  const Block& block = args.perturb.block;
  const Unit unit = unit_of_warp(block, unit_log2, blockIdx.x);
  if (unit.row >= block.rows) return;
  const PlaneRow row(args, unit.row);
  const T* weight =
      static_cast<const T*>(args.perturb.weight) + unit.row * args.perturb.weight_stride;
  T* out = static_cast<T*>(args.perturb.out) + unit.row * args.perturb.out_stride;
  constexpr int kCols = Vectors ? kVector : 4;
  // The unit's first group may start before the unit.
  const int64_t misfit = static_cast<int64_t>((block.col_offset + unit.begin) % 4);
  int64_t j = unit.begin - misfit + kCols * (threadIdx.x % kWarp);
  for (; j < unit.end; j += kCols * kWarp) {
    float e[kCols];
#pragma unroll
    for (int k = 0; k < kCols; k += 4) {
      row.group(static_cast<uint32_t>((block.col_offset + j + k) / 4), e + k);
    }
    if constexpr (Vectors) {
      if (j + kVector <= unit.end) {
        float value[kVector];
        add_to(load_packed(weight + j), e, value);
        const Packed<T> result = round_packed<T>(value);
        if (all_finite(result)) {
          store_packed(out + j, result);
          continue;
        }
      }
    }
    // Unrolled with constant lanes: an index into registers would go through local memory.
#pragma unroll
    for (int lane = 0; lane < kCols; ++lane) {
      if (j + lane < unit.begin || j + lane >= unit.end) continue;
      const T before = weight[j + lane];
      out[j + lane] = keep_finite<T>(before, to_float(before) + e[lane]);
    }
  }
}

void launch_perturb_plane(const PlaneArgs& args, int sm_count, cudaStream_t stream) {
  const PerturbArgs& own = args.perturb;
  const Block& block = own.block;
  const UnitGrid grid = unit_grid(block.rows, block.cols, sm_count);
  if (grid.blocks == 0) return;
  const bool vectors = is_vector_aligned(own.weight, own.weight_stride, own.weight_dtype) &&
                       is_vector_aligned(own.out, own.out_stride, own.out_dtype) &&
                       block.col_offset % 4 == 0;
  with_type(own.weight_dtype, [&](auto weight) {
    using T = decltype(weight);
    if (vectors) {
      FLATKERN_LAUNCH((perturb_plane_kernel<T, true>), grid.blocks, kThreads, stream, args,
                      grid.log2);
    } else {
      FLATKERN_LAUNCH((perturb_plane_kernel<T, false>), grid.blocks, kThreads, stream, args,
                      grid.log2);
    }
  });
}

}  // namespace flatkern::cuda

// Perturb and restore: one warp per row and kUnitCols columns, 128-bit loads and stores.
#include "perturb.h"

namespace flatkern::cuda {

// Rows are 16-byte aligned and start on a group.
template <class Op, class Src, class Dst, bool Elementwise>
__global__ void __launch_bounds__(kThreads) perturb_kernel(PerturbArgs args) {
  const Window& window = args.window;
  const NoiseKey key = load_key(window.key);
  const int lane = threadIdx.x % kWarp;
  for (UnitWalk walk = walk_of_warp(window); walk.inside(); walk.next()) {
    const int64_t i = walk.row, begin = walk.begin(), end = walk.end(window.cols);
    const PhiloxRow row = philox_row(key, static_cast<uint32_t>(window.row_offset + i));
    const RowScale c = row_scale_of(args.row_scale[i]);
    const Src* weight = static_cast<const Src*>(args.weight) + i * args.weight_stride;
    Dst* out = static_cast<Dst*>(args.out) + i * args.out_stride;

    // Whole vectors of this lane; none where e needs its shift.
    const int64_t first = begin + lane * kVector;
    const int64_t left = c.after == 1.0f ? end - first : 0;
    const int64_t steps = left < kVector ? 0 : (left - kVector) / kWarpCols + 1;
    const int64_t whole = first + steps * kWarpCols;
    for (int64_t j = first; j < end; j += kWarpCols) {
      if (j < whole) {
        j = apply_vectors<Op, Elementwise>(weight, out, row, window.col_offset, j, whole, c.scale);
      }
      // What stopped it, the vector that the row's end cuts, or any where e needs its shift.
      const int64_t to = j + kVector < end ? j + kVector : end;
      apply_scalar<Op, Elementwise>(weight, out, row, window.col_offset, j, to, c);
    }
  }
}

// Any alignment: a thread takes one group of columns at a time.
template <class Op, class Src, class Dst, bool Elementwise>
__global__ void __launch_bounds__(kThreads) perturb_unaligned_kernel(PerturbArgs args) {
  const Window& window = args.window;
  const NoiseKey key = load_key(window.key);
  const int lane = threadIdx.x % kWarp;
  for (UnitWalk walk = walk_of_warp(window); walk.inside(); walk.next()) {
    const int64_t i = walk.row, begin = walk.begin(), end = walk.end(window.cols);
    const PhiloxRow row = philox_row(key, static_cast<uint32_t>(window.row_offset + i));
    const RowScale c = row_scale_of(args.row_scale[i]);
    const Src* weight = static_cast<const Src*>(args.weight) + i * args.weight_stride;
    Dst* out = static_cast<Dst*>(args.out) + i * args.out_stride;
    // The unit's first group may start before the unit.
    const int64_t misfit = static_cast<int64_t>((window.col_offset + begin) % 4);
    for (int64_t j = begin - misfit + 4 * lane; j < end; j += 4 * kWarp) {
      const int64_t from = j < begin ? begin : j, to = j + 4 < end ? j + 4 : end;
      apply_scalar<Op, Elementwise>(weight, out, row, window.col_offset, from, to, c);
    }
  }
}

template <class Op, class Src, class Dst, bool Elementwise>
static void launch_as(const PerturbArgs& args, int sm_count, cudaStream_t stream) {
  const Window& window = args.window;
  const int blocks = grid_blocks(window.rows * units_per_row(window.cols), sm_count);
  const bool aligned = is_vector_aligned(args.weight, args.weight_stride, args.weight_dtype) &&
                       is_vector_aligned(args.out, args.out_stride, args.out_dtype) &&
                       window.col_offset % 4 == 0;
  if (aligned) {
    FLATKERN_LAUNCH((perturb_kernel<Op, Src, Dst, Elementwise>), blocks, kThreads, stream, args);
  } else {
    FLATKERN_LAUNCH((perturb_unaligned_kernel<Op, Src, Dst, Elementwise>), blocks, kThreads, stream,
                    args);
  }
}

template <class Op, class Src, class Dst>
static void launch_dtypes(const PerturbArgs& args, int sm_count, cudaStream_t stream) {
  if (args.elementwise) {
    launch_as<Op, Src, Dst, true>(args, sm_count, stream);
  } else {
    launch_as<Op, Src, Dst, false>(args, sm_count, stream);
  }
}

void launch_perturb(const PerturbArgs& args, int sm_count, cudaStream_t stream) {
  if (args.window.rows == 0 || args.window.cols == 0) return;
  with_type(args.weight_dtype, [&](auto weight) {
    with_type(args.out_dtype, [&](auto out) {
      launch_dtypes<Perturb, decltype(weight), decltype(out)>(args, sm_count, stream);
    });
  });
}

void launch_restore(const PerturbArgs& args, int sm_count, cudaStream_t stream) {
  if (args.window.rows == 0 || args.window.cols == 0) return;
  with_type(args.weight_dtype, [&](auto weight) {
    launch_dtypes<Restore, decltype(weight), decltype(weight)>(args, sm_count, stream);
  });
}

}  // namespace flatkern::cuda

// Perturb and restore: one warp per row and kUnitCols columns, 128-bit loads and stores.
#include "perturb.h"

#include <tuple>

namespace flatkern::cuda {

// Rows are 16-byte aligned and start on a group.
template <class Op, class Src, class Dst, bool Elementwise>
__global__ void __launch_bounds__(kThreads)
    perturb_kernel(const __grid_constant__ Table<PerturbArgs> table) {
  const Place place = place_of(table, blockIdx.x);
  const PerturbArgs& args = table.tensors[place.tensor];
  const Window& window = args.window;
  const NoiseKey key = load_key(window.key);
  const int lane = threadIdx.x % kWarp;
  UnitWalk walk = walk_of_warp(window, place.block, place.blocks);
  for (; walk.inside(); walk.next()) {
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
__global__ void __launch_bounds__(kThreads)
    perturb_unaligned_kernel(const __grid_constant__ Table<PerturbArgs> table) {
  const Place place = place_of(table, blockIdx.x);
  const PerturbArgs& args = table.tensors[place.tensor];
  const Window& window = args.window;
  const NoiseKey key = load_key(window.key);
  const int lane = threadIdx.x % kWarp;
  UnitWalk walk = walk_of_warp(window, place.block, place.blocks);
  for (; walk.inside(); walk.next()) {
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

static bool is_aligned(const PerturbArgs& args) {
  return is_vector_aligned(args.weight, args.weight_stride, args.weight_dtype) &&
         is_vector_aligned(args.out, args.out_stride, args.out_dtype) &&
         args.window.col_offset % 4 == 0;
}

static std::vector<Table<PerturbArgs>> perturb_tables(const std::vector<PerturbArgs>& tensors,
                                                      int sm_count) {
  return tables_of(
      tensors,
      [](const PerturbArgs& args) {
        return std::tuple(args.weight_dtype, args.out_dtype, args.elementwise, is_aligned(args));
      },
      [&](const PerturbArgs& args) {
        return grid_blocks(args.window.rows * units_per_row(args.window.cols), sm_count);
      });
}

template <class Op, class Src, class Dst, bool Elementwise>
static void launch_as(const Table<PerturbArgs>& table, cudaStream_t stream) {
  const int blocks = static_cast<int>(table.blocks());
  if (is_aligned(table.tensors[0])) {
    FLATKERN_LAUNCH((perturb_kernel<Op, Src, Dst, Elementwise>), blocks, kThreads, stream, table);
  } else {
    FLATKERN_LAUNCH((perturb_unaligned_kernel<Op, Src, Dst, Elementwise>), blocks, kThreads, stream,
                    table);
  }
}

template <class Op, class Src, class Dst>
static void launch_dtypes(const Table<PerturbArgs>& table, cudaStream_t stream) {
  if (table.tensors[0].elementwise) {
    launch_as<Op, Src, Dst, true>(table, stream);
  } else {
    launch_as<Op, Src, Dst, false>(table, stream);
  }
}

void launch_perturb(const std::vector<PerturbArgs>& tensors, int sm_count, cudaStream_t stream) {
  for (const Table<PerturbArgs>& table : perturb_tables(tensors, sm_count)) {
    with_type(table.tensors[0].weight_dtype, [&](auto weight) {
      with_type(table.tensors[0].out_dtype, [&](auto out) {
        launch_dtypes<Perturb, decltype(weight), decltype(out)>(table, stream);
      });
    });
  }
}

void launch_restore(const std::vector<PerturbArgs>& tensors, int sm_count, cudaStream_t stream) {
  for (const Table<PerturbArgs>& table : perturb_tables(tensors, sm_count)) {
    with_type(table.tensors[0].weight_dtype, [&](auto weight) {
      launch_dtypes<Restore, decltype(weight), decltype(weight)>(table, stream);
    });
  }
}

}  // namespace flatkern::cuda

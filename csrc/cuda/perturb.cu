// Perturb and restore: a warp per row and unit of columns, 128-bit loads and stores.
#include "perturb.h"

#include <tuple>

namespace flatkern::cuda {

// A row's elements and what their noise is made of.
template <class Src, class Dst>
struct Row {
  const Src* weight;
  Dst* out;
  PhiloxRow philox;
  RowScale c;

  __device__ __forceinline__ Row(const PerturbArgs& args, int64_t i)
      : weight(static_cast<const Src*>(args.weight) + i * args.weight_stride),
        out(static_cast<Dst*>(args.out) + i * args.out_stride),
        philox(
            philox_row(load_key(args.block.key), static_cast<uint32_t>(args.block.row_offset + i))),
        c(row_scale_of(args.row_scale[i])) {}
};

// Rows are 16-byte aligned and start on a group.
template <class Op, class Src, class Dst, bool Elementwise>
__global__ void __launch_bounds__(kThreads, kPerturbBlocksPerSm)
    perturb_kernel(const __grid_constant__ Table<PerturbArgs> table, int unit_log2) {
  const Place place = place_of(table, blockIdx.x);
  const PerturbArgs& args = table.tensors[place.tensor];
  const Block& block = args.block;
  const Unit unit = unit_of_warp(block, unit_log2, place.block);
  if (unit.row >= block.rows) return;
  const Row<Src, Dst> row(args, unit.row);

  const int64_t first = unit.begin + threadIdx.x % kWarp * kVector;
  const int left = static_cast<int>(unit.end - first);
  // Vectors of this lane; the row's end may cut the last.
  const int whole = left < kVector ? 0 : (left - kVector) / kWarpCols + 1;
  const int all = left <= 0 ? 0 : (left - 1) / kWarpCols + 1;
  uint32_t others = (1u << all) - 1u;
  if (row.c.after == 1.0f) {
    const uint32_t group = static_cast<uint32_t>((block.col_offset + first) / 4);
    const uint32_t wild = apply_vectors<Op, Elementwise>(row.weight + first, row.out + first,
                                                         row.philox, group, whole, row.c.scale);
    others ^= ((1u << whole) - 1u) ^ wild;
  }
  // What is not finite, what the row's end cuts, and all where e needs its shift.
  for (int64_t j = first; others != 0; j += kWarpCols, others >>= 1) {
    if ((others & 1u) == 0) continue;
    const int64_t end = j + kVector < unit.end ? j + kVector : unit.end;
    apply_scalar<Op, Elementwise>(row.weight, row.out, row.philox, block.col_offset, j, end, row.c);
  }
}

// Any alignment: a thread takes one group of columns at a time.
template <class Op, class Src, class Dst, bool Elementwise>
__global__ void __launch_bounds__(kThreads)
    perturb_unaligned_kernel(const __grid_constant__ Table<PerturbArgs> table, int unit_log2) {
  const Place place = place_of(table, blockIdx.x);
  const PerturbArgs& args = table.tensors[place.tensor];
  const Block& block = args.block;
  const Unit unit = unit_of_warp(block, unit_log2, place.block);
  if (unit.row >= block.rows) return;
  const Row<Src, Dst> row(args, unit.row);
  // The unit's first group may start before the unit.
  const int64_t misfit = static_cast<int64_t>((block.col_offset + unit.begin) % 4);
  int64_t j = unit.begin - misfit + 4 * (threadIdx.x % kWarp);
  for (; j < unit.end; j += 4 * kWarp) {
    const int64_t begin = j < unit.begin ? unit.begin : j;
    const int64_t end = j + 4 < unit.end ? j + 4 : unit.end;
    apply_scalar<Op, Elementwise>(row.weight, row.out, row.philox, block.col_offset, begin, end,
                                  row.c);
  }
}

static bool is_aligned(const PerturbArgs& args) {
  return is_vector_aligned(args.weight, args.weight_stride, args.weight_dtype) &&
         is_vector_aligned(args.out, args.out_stride, args.out_dtype) &&
         args.block.col_offset % 4 == 0;
}

template <class Op, class Src, class Dst, bool Elementwise>
static void launch_as(const Table<PerturbArgs>& table, int unit_log2, cudaStream_t stream) {
  const int blocks = static_cast<int>(table.blocks());
  if (is_aligned(table.tensors[0])) {
    FLATKERN_LAUNCH((perturb_kernel<Op, Src, Dst, Elementwise>), blocks, kThreads, stream, table,
                    unit_log2);
  } else {
    FLATKERN_LAUNCH((perturb_unaligned_kernel<Op, Src, Dst, Elementwise>), blocks, kThreads, stream,
                    table, unit_log2);
  }
}

// The launches for `tensors`: launch(table, unit_log2).
template <class Launch>
static void launch_tables(const std::vector<PerturbArgs>& tensors, int sm_count,
                          const Launch& launch) {
  const auto units = [](const PerturbArgs& args, int log2) {
    return args.block.rows * units_per_row(args.block.cols, log2);
  };
  int64_t long_units = 0;
  for (const PerturbArgs& args : tensors) long_units += units(args, kLongUnitLog2);
  const int log2 = unit_log2(long_units, sm_count);
  const auto kernel = [](const PerturbArgs& args) {
    return std::tuple(args.weight_dtype, args.out_dtype, args.elementwise, is_aligned(args));
  };
  const auto blocks = [&](const PerturbArgs& args) {
    return static_cast<uint32_t>(divide_up(units(args, log2), kWarpsPerBlock));
  };
  for (const Table<PerturbArgs>& table : tables_of(tensors, kernel, blocks)) launch(table, log2);
}

template <class Op, class Src, class Dst>
static void launch_dtypes(const Table<PerturbArgs>& table, int unit_log2, cudaStream_t stream) {
  if (table.tensors[0].elementwise) {
    launch_as<Op, Src, Dst, true>(table, unit_log2, stream);
  } else {
    launch_as<Op, Src, Dst, false>(table, unit_log2, stream);
  }
}

void launch_perturb(const std::vector<PerturbArgs>& tensors, int sm_count, cudaStream_t stream) {
  launch_tables(tensors, sm_count, [&](const Table<PerturbArgs>& table, int log2) {
    with_type(table.tensors[0].weight_dtype, [&](auto weight) {
      with_type(table.tensors[0].out_dtype, [&](auto out) {
        launch_dtypes<Perturb, decltype(weight), decltype(out)>(table, log2, stream);
      });
    });
  });
}

void launch_restore(const std::vector<PerturbArgs>& tensors, int sm_count, cudaStream_t stream) {
  launch_tables(tensors, sm_count, [&](const Table<PerturbArgs>& table, int log2) {
    with_type(table.tensors[0].weight_dtype, [&](auto weight) {
      launch_dtypes<Restore, decltype(weight), decltype(weight)>(table, log2, stream);
    });
  });
}

}  // namespace flatkern::cuda

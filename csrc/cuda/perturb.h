// The inner loops of perturb and restore, shared by the elementwise and the fused kernels.
#pragma once

#include "device.h"

namespace flatkern::cuda {

// What the element becomes, before rounding; e = c z in float32. Compiled with -fmad=false.
struct Perturb {
  FLATKERN_HD static float addend(float e) { return e; }
  FLATKERN_HD static float apply(float w, float e, bool elementwise) {
    return w + (elementwise ? e * fabsf(w) : e);
  }
};

struct Restore {
  FLATKERN_HD static float addend(float e) { return -e; }
  FLATKERN_HD static float apply(float s, float e, bool elementwise) {
    return restored_value(s, 1.0f, e, elementwise);
  }
};

// kVector columns of one row, from the group of the first.
template <class Op, class Dst, class Src, bool Elementwise>
FLATKERN_HD Packed<Dst> apply_vector(const Packed<Src>& weight, const PhiloxRow& row,
                                     uint32_t group, float scale) {
  float e[kVector], value[kVector];
  scaled_group(row, group, scale, e);
  scaled_group(row, group + 1, scale, e + 4);
  if constexpr (Elementwise) {
    float w[kVector];
    to_floats(weight, w);
    for (int i = 0; i < kVector; ++i) value[i] = Op::apply(w[i], e[i], true);
  } else {
    for (int i = 0; i < kVector; ++i) e[i] = Op::addend(e[i]);
    add_to(weight, e, value);
  }
  return round_packed<Dst>(value);
}

// The calling lane's vectors of one row, every kWarpCols columns from `begin` up to `end`, a whole
// number of steps away. Stops at one that does not stay finite; the column where it stopped.
template <class Op, bool Elementwise, class Src, class Dst>
FLATKERN_HD int64_t apply_vectors(const Src* weight, Dst* out, const PhiloxRow& row,
                                  uint64_t col_offset, int64_t begin, int64_t end, float scale) {
  // The noise's group counts the steps and makes the addresses, in one wide multiply each.
  uint64_t source = reinterpret_cast<uint64_t>(weight) - col_offset * sizeof(Src);
  uint64_t target = reinterpret_cast<uint64_t>(out) - col_offset * sizeof(Dst);
  uint32_t group = static_cast<uint32_t>((col_offset + begin) / 4);
  uint32_t last = static_cast<uint32_t>((col_offset + end) / 4);
  opaque(source);
  opaque(target);
  opaque(last);
  for (; group != last; group += kWarpCols / 4) {
    opaque(group);
    const uint64_t column = 4 * static_cast<uint64_t>(group);
    const Packed<Dst> result = apply_vector<Op, Dst, Src, Elementwise>(
        load_packed(global_pointer<const Src>(source + column * sizeof(Src))), row, group, scale);
    if (!all_finite(result)) break;
    store_packed(global_pointer<Dst>(target + column * sizeof(Dst)), result);
  }
  return end - 4 * static_cast<int64_t>(last - group);
}

// Columns [begin, end) of one row, one by one: tails, unaligned rows, and what is not finite.
template <class Op, bool Elementwise, class Src, class Dst>
FLATKERN_HD void apply_scalar(const Src* weight, Dst* out, const PhiloxRow& row,
                              uint64_t col_offset, int64_t begin, int64_t end, RowScale c) {
  const int64_t misfit = static_cast<int64_t>((col_offset + begin) % 4);
  for (int64_t j = begin - misfit; j < end; j += 4) {
    float e[4];
    scaled_group(row, static_cast<uint32_t>((col_offset + j) / 4), c.scale, e);
    // Unrolled with constant lanes: an index into registers would go through local memory.
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      if (j + lane < begin || j + lane >= end) continue;
      const Src before = weight[j + lane];
      const float value = Op::apply(to_float(before), e[lane] * c.after, Elementwise);
      out[j + lane] = keep_finite<Dst>(before, value);
    }
  }
}

}  // namespace flatkern::cuda

// The inner loops of perturb and restore.
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

// kVector columns of one row in float32, from the group of the first.
template <class Op, bool Elementwise, class Src>
FLATKERN_HD void apply_noise(const Packed<Src>& weight, const PhiloxRow& row, uint32_t group,
                             float scale, float* value) {
  float e[kVector];
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
}

// Vectors that a lane has loaded ahead: 32 bytes.
template <class Src>
constexpr uint32_t kAhead = sizeof(Src) == 4 ? 1 : 2;

// The calling lane's `count` vectors of one row, kWarpCols columns apart, the first at `weight` and
// `out` with the noise of `group`. Those that do not stay finite are not written: these, as bits.
template <class Op, bool Elementwise, class Src, class Dst>
FLATKERN_HD uint32_t apply_vectors(const Src* weight, Dst* out, const PhiloxRow& row,
                                   uint32_t group, uint32_t count, float scale) {
  // A vector's number makes its addresses in one wide multiply each.
  const auto at = [](auto* first, uint32_t k) {
    return global_pointer<std::remove_pointer_t<decltype(first)>>(
        reinterpret_cast<uint64_t>(first) + uint64_t{k} * (kWarpCols * sizeof(*first)));
  };
  Packed<Src> loaded[kAhead<Src>] = {};
#pragma unroll
  for (uint32_t v = 0; v < kAhead<Src>; ++v) {
    if (v < count) loaded[v] = load_packed(at(weight, v));
  }
  uint32_t left = 0;
#pragma unroll 1
  for (uint32_t k = 0; k < count; k += kAhead<Src>) {
    opaque(k);
#pragma unroll
    for (uint32_t v = 0; v < kAhead<Src>; ++v) {
      if (k + v >= count) break;
      float value[kVector];
      apply_noise<Op, Elementwise>(loaded[v], row, group + (k + v) * (kWarpCols / 4), scale, value);
      // Its latency hides behind the noise of the vectors in between.
      const uint32_t next = k + v + kAhead<Src>;
      if (next < count) loaded[v] = load_packed(at(weight, next));
      const Packed<Dst> result = round_packed<Dst>(value);
      if (all_finite(result)) {
        store_packed(at(out, k + v), result);
      } else {
        left |= 1u << (k + v);
      }
    }
  }
  return left;
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

// Perturb and restore. Compiled once per instruction set.

namespace flatkern::cpu::FLATKERN_ISA {

struct Perturb {
  FLATKERN_INLINE VFloat apply(VFloat w, VFloat c, VFloat z, bool elementwise) {
    const VFloat e = c * z;
    return w + (elementwise ? e * absolute(w) : e);
  }
  FLATKERN_INLINE float apply(float w, float c, float z, bool elementwise) {
    return perturbed_value(w, c, z, elementwise);
  }
};

struct Restore {
  FLATKERN_INLINE VFloat apply(VFloat s, VFloat c, VFloat z, bool elementwise) {
    const VFloat e = c * z;
    if (!elementwise) return s - e;
    const VFloat one = splat(1.0f);
    const VFloat factor = s > 0.0f ? one + e : (s < 0.0f ? one - e : one);
    return factor > 0.0625f ? s / factor : s;
  }
  FLATKERN_INLINE float apply(float s, float c, float z, bool elementwise) {
    return restored_value(s, c, z, elementwise);
  }
};

template <class Op, class Src, class Dst>
FLATKERN_INLINE void one_by_one(const Src* weight, Dst* out, int count, float c, const float* z,
                                bool elementwise) {
  for (int i = 0; i < count; ++i) {
    const float value = Op::apply(to_float(weight[i]), c, z[i], elementwise);
    out[i] = keep_finite<Dst>(weight[i], value);
  }
}

// Two bfloat16 are a lane of 32 bits, as two normals are: no interleaving, and one test for both.
template <class Src, class Dst>
constexpr Order kOrder =
    std::is_same_v<Src, BFloat16> && std::is_same_v<Dst, BFloat16> ? Order::kMemory : Order::kSplit;

// A step of columns, scaled by c; false, with nothing written, where an element is not finite.
template <class Op, class Src, class Dst>
FLATKERN_INLINE bool perturb_step(const Src* weight, Dst* out, const Normals& z, VFloat scale,
                                  bool elementwise) {
  if constexpr (kOrder<Src, Dst> == Order::kMemory) {
    const VUint w = load_vector<VUint>(weight);
    const VFloat even = Op::apply((VFloat)(w << 16), scale, z.even, elementwise);
    const VFloat odd = Op::apply((VFloat)(w & 0xFFFF0000u), scale, z.odd, elementwise);
    // The low half of any NaN here is 0, so that rounding leaves it one.
    const VUint after = (rounded_bfloat16(odd) & 0xFFFF0000u) | (rounded_bfloat16(even) >> 16);
    if (__builtin_expect(any_exponent_full(after), 0)) return false;
    store_vector(out, after);
  } else {
    const VFloat limit = splat(overflow_of(out));
    const VFloat first = Op::apply(load(weight), scale, interleave_low(z.even, z.odd), elementwise);
    const VFloat second =
        Op::apply(load(weight + kLanes), scale, interleave_high(z.even, z.odd), elementwise);
    // Also true for NaN, which no comparison admits.
    const VInt finite = (absolute(first) < limit) & (absolute(second) < limit);
    if (__builtin_expect(any(~finite), 0)) return false;
    store(out, first);
    store(out + kLanes, second);
  }
  return true;
}

// Columns [begin, end) of one row, scaled by c.
template <class Op, class Src, class Dst>
FLATKERN_INLINE void perturb_columns(const PerturbArgs& args, int64_t row, int64_t begin,
                                     int64_t end, float c, bool elementwise) {
  const Src* weight = static_cast<const Src*>(args.weight) + row * args.weight_stride;
  Dst* out = static_cast<Dst*>(args.out) + row * args.out_stride;
  c = usable_scale(c);
  const VFloat scale = splat(c);
  constexpr Order kSteps = kOrder<Src, Dst>;
  for_each_step<kSteps>(
      args.block, row, begin, end,
      [&](int64_t j, const Normals& z) {
        if (perturb_step<Op>(weight + j, out + j, z, scale, elementwise)) return;
        float values[kStep];
        spread<kSteps>(z, values);
        one_by_one<Op>(weight + j, out + j, kStep, c, values, elementwise);
      },
      [&](int64_t j, int count, const float* values) {
        one_by_one<Op>(weight + j, out + j, count, c, values, elementwise);
      });
}

template <class Op, class Src, class Dst>
void perturb_columns_as(const PerturbArgs& args, int64_t row, int64_t begin, int64_t end, float c) {
  // A constant flag, so that the loop holds one of the two forms.
  if (args.elementwise) {
    perturb_columns<Op, Src, Dst>(args, row, begin, end, c, true);
  } else {
    perturb_columns<Op, Src, Dst>(args, row, begin, end, c, false);
  }
}

using ColumnsFunction = void (*)(const PerturbArgs&, int64_t row, int64_t begin, int64_t end,
                                 float c);

template <class Op, class Src>
ColumnsFunction columns_function(Dtype out) {
  switch (out) {
    case Dtype::kFloat32:
      return perturb_columns_as<Op, Src, float>;
    case Dtype::kBFloat16:
      return perturb_columns_as<Op, Src, BFloat16>;
    default:
      return perturb_columns_as<Op, Src, Float16>;
  }
}

ColumnsFunction perturb_function(Dtype weight, Dtype out) {
  switch (weight) {
    case Dtype::kFloat32:
      return columns_function<Perturb, float>(out);
    case Dtype::kBFloat16:
      return columns_function<Perturb, BFloat16>(out);
    default:
      return columns_function<Perturb, Float16>(out);
  }
}

ColumnsFunction restore_function(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return perturb_columns_as<Restore, float, float>;
    case Dtype::kBFloat16:
      return perturb_columns_as<Restore, BFloat16, BFloat16>;
    default:
      return perturb_columns_as<Restore, Float16, Float16>;
  }
}

void run_columns(ColumnsFunction columns, const PerturbArgs& args, int64_t unit_begin,
                 int64_t unit_end) {
  const KeepDenormals keep;
  for_each_block(args.block, unit_begin, unit_end, [&](int64_t row, int64_t begin, int64_t end) {
    columns(args, row, begin, end, args.row_scale[row]);
  });
}

void perturb(const PerturbArgs& args, int64_t unit_begin, int64_t unit_end) {
  run_columns(perturb_function(args.weight_dtype, args.out_dtype), args, unit_begin, unit_end);
}

void restore(const PerturbArgs& args, int64_t unit_begin, int64_t unit_end) {
  run_columns(restore_function(args.weight_dtype), args, unit_begin, unit_end);
}

}  // namespace flatkern::cpu::FLATKERN_ISA

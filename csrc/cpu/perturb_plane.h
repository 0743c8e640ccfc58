// W + c z + d y: two noises in one pass. Compiled once per instruction set.

namespace flatkern::cpu::FLATKERN_ISA {

// Columns [begin, end) of one row, at most kBlockCols. Each noise is made into cache first.
template <class T>
void plane_columns(const PlaneArgs& args, int64_t row, int64_t begin, int64_t end) {
  const PerturbArgs& own = args.perturb;
  const T* weight = static_cast<const T*>(own.weight) + row * own.weight_stride + begin;
  T* out = static_cast<T*>(own.out) + row * own.out_stride + begin;
  alignas(64) float z[kBlockCols], y[kBlockCols];
  Block other = own.block;
  other.key = args.key;
  draw_columns<Gaussian>(own.block, row, begin, end, z);
  draw_columns<Gaussian>(other, row, begin, end, y);
  const float c = usable_scale(own.row_scale[row]), d = usable_scale(args.row_scale[row]);
  const VFloat limit = splat(overflow_of(out));
  const int64_t count = end - begin;
  for (int64_t j = 0; j < count;) {
    if (count - j >= kLanes) {
      const VFloat e = splat(c) * load(z + j) + splat(d) * load(y + j);
      const VFloat value = load(weight + j) + e;
      // Also true for NaN, which no comparison admits.
      if (__builtin_expect(!any(~(absolute(value) < limit)), 1)) {
        store(out + j, value);
        j += kLanes;
        continue;
      }
    }
    for (const int64_t last = count - j < kLanes ? count : j + kLanes; j < last; ++j) {
      const float e = c * z[j] + d * y[j];
      out[j] = keep_finite<T>(weight[j], to_float(weight[j]) + e);
    }
  }
}

void perturb_plane(const PlaneArgs& args, int64_t unit_begin, int64_t unit_end) {
  const KeepDenormals keep;
  const auto columns = args.perturb.weight_dtype == Dtype::kFloat32    ? plane_columns<float>
                       : args.perturb.weight_dtype == Dtype::kBFloat16 ? plane_columns<BFloat16>
                                                                       : plane_columns<Float16>;
  for_each_block(args.perturb.block, unit_begin, unit_end,
                 [&](int64_t row, int64_t begin, int64_t end) { columns(args, row, begin, end); });
}

}  // namespace flatkern::cpu::FLATKERN_ISA

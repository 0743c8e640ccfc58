// Row norms of W + s B A, tile by tile: the merged weight lives in registers only. Compiled once
// per instruction set.

namespace flatkern::cpu::FLATKERN_ISA {

// Rows that share each load of A.
constexpr int kNormRows = 4;
constexpr int kParts = kNormLanes / kLanes;
constexpr int64_t kFlushCols = 1024;

struct RowSum {
  VFloat lanes[kParts];
  double total;
};

FLATKERN_INLINE void flush(RowSum& sum) {
  float values[kNormLanes];
  for (int p = 0; p < kParts; ++p) {
    store(values + p * kLanes, sum.lanes[p]);
    sum.lanes[p] = VFloat{};
  }
  for (int i = 0; i < kNormLanes; ++i) sum.total += values[i];
}

// Adds the squares of kNormLanes columns of Rows rows; lora_A points at the first of them.
template <int Rows, class T>
FLATKERN_INLINE void add_squares(const RowNormArgs& args, const T* const* weight,
                                 const float* lora_A, const float* const* lora_B, RowSum* sums) {
  VFloat merged[Rows][kParts];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) merged[r][p] = load(weight[r] + p * kLanes);
  }
  for (int64_t k = 0; k < args.rank; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const VFloat a = load(lora_A + k * args.lora_A_stride + p * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        merged[r][p] = multiply_add(splat(lora_B[r][k]), a, merged[r][p]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      sums[r].lanes[p] = multiply_add(merged[r][p], merged[r][p], sums[r].lanes[p]);
    }
  }
}

// The same sum in float64, for rows whose squares leave the range of float32.
template <class T>
double sum_squares_wide(const RowNormArgs& args, const T* weight, const float* lora_B) {
  double total = 0.0;
  for (int64_t j = 0; j < args.cols; ++j) {
    double merged = to_float(weight[j]);
    for (int64_t k = 0; k < args.rank; ++k) {
      merged += static_cast<double>(lora_B[k]) * args.lora_A[k * args.lora_A_stride + j];
    }
    total += merged * merged;
  }
  return total;
}

template <int Rows, class T>
void norm_rows(const RowNormArgs& args, int64_t row) {
  const T* weight[Rows];
  const float* lora_B[Rows];
  RowSum sums[Rows] = {};
  for (int r = 0; r < Rows; ++r) {
    weight[r] = static_cast<const T*>(args.weight) + (row + r) * args.weight_stride;
    lora_B[r] = args.lora_B + (row + r) * args.rank;
  }
  int64_t j = 0;
  for (; j + kNormLanes <= args.cols; j += kNormLanes) {
    const T* here[Rows];
    for (int r = 0; r < Rows; ++r) here[r] = weight[r] + j;
    add_squares<Rows>(args, here, args.lora_A + j, lora_B, sums);
    if ((j + kNormLanes) % kFlushCols == 0) {
      for (int r = 0; r < Rows; ++r) flush(sums[r]);
    }
  }
  if (j < args.cols) {
    // The tail in zero-padded copies, as lora_A is: a zero column adds nothing.
    T tail[Rows][kNormLanes] = {};
    const T* here[Rows];
    for (int r = 0; r < Rows; ++r) {
      memcpy(tail[r], weight[r] + j, (args.cols - j) * sizeof(T));
      here[r] = tail[r];
    }
    add_squares<Rows>(args, here, args.lora_A + j, lora_B, sums);
  }
  for (int r = 0; r < Rows; ++r) {
    flush(sums[r]);
    double total = sums[r].total;
    // Outside this range a square may have overflowed or lost its bits.
    if (!(total > 1e-28 && total < 1e37)) total = sum_squares_wide(args, weight[r], lora_B[r]);
    args.norm[row + r] = static_cast<float>(__builtin_sqrt(total)) * args.relative_scale;
  }
}

template <class T>
void norm_row_range(const RowNormArgs& args, int64_t row, int64_t row_end) {
  for (; row + kNormRows <= row_end; row += kNormRows) norm_rows<kNormRows, T>(args, row);
  for (; row < row_end; ++row) norm_rows<1, T>(args, row);
}

void row_norm(const RowNormArgs& args, int64_t row_begin, int64_t row_end) {
  const KeepDenormals keep;
  switch (args.weight_dtype) {
    case Dtype::kFloat32:
      return norm_row_range<float>(args, row_begin, row_end);
    case Dtype::kBFloat16:
      return norm_row_range<BFloat16>(args, row_begin, row_end);
    case Dtype::kFloat16:
      return norm_row_range<Float16>(args, row_begin, row_end);
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA

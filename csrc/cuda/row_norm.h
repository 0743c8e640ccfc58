// Row norms of W + s B A without forming it: |w|^2 + 2 b.(A w) + b.(A A^T b) of a row w of W and
// the row b of sB. Tensor cores multiply A, split into bfloat16 parts, by W as it lies in memory; a
// bound of the error decides, row by row, whether the sum stands or is formed again in float64.
// docs/row_norm.md derives the bound.
//
// row_norm_prepare_kernel fills a tensor's scratch, row_norm_kernel does the rest. A block of that
// takes a panel of a block of rows; whichever block of the same rows ends last adds the panels up.
#pragma once

#include "mma.h"

namespace flatkern::cuda {

// Ranks come in blocks, columns in steps (of two products), these in panels.
constexpr int kRankBlock = 16;
constexpr int kStepCols = 32;
constexpr int kPanelSteps = 8;
constexpr int kPanelCols = kPanelSteps * kStepCols;
constexpr int kParts = 3;
// 128-bit words of A's parts, of a step and a block of ranks: a product's left operand a warp each.
constexpr int kStepWords = kParts * 2 * kWarp;

// Rows of a warp come in groups of 8; the parts of wider elements take more registers.
FLATKERN_HD constexpr int norm_groups(Dtype dtype) { return dtype == Dtype::kBFloat16 ? 4 : 2; }
FLATKERN_HD constexpr int norm_rows(Dtype dtype) { return kWarpsPerBlock * 8 * norm_groups(dtype); }
// Blocks of ranks whose products a warp keeps at a time: for more of them W is read again, from L2.
FLATKERN_HD constexpr int norm_blocks(int64_t rank) {
  return rank == 0 ? 0 : rank <= kRankBlock ? 1 : 2;
}

// A tensor's scratch and the sizes that it follows from; ranks, rows and columns are filled up with
// zeros to whole blocks and panels.
struct NormScratch {
  int64_t row_blocks, rows;
  int panels, blocks, ranks;
  // Columns are cut into this many parts for A A^T, so that several blocks share it.
  int gram_parts;
  uint64_t words_at, gram_at, lora_B_at, squares_at, crosses_at, forms_at, done_at, bytes;
  char* base;

  // A's parts: [groups of blocks][steps][blocks of the group][parts][halves of a step][lanes].
  FLATKERN_HD Bits128* words() const { return reinterpret_cast<Bits128*>(base + words_at); }
  // A A^T: [block][block][gram_parts][kRankBlock][kRankBlock].
  FLATKERN_HD double* gram() const { return reinterpret_cast<double*>(base + gram_at); }
  // sB: [rows][ranks].
  FLATKERN_HD float* lora_B() const { return reinterpret_cast<float*>(base + lora_B_at); }
  // Sums of w^2, and b.(A w): [panels][rows].
  FLATKERN_HD float* squares() const { return reinterpret_cast<float*>(base + squares_at); }
  FLATKERN_HD float* crosses() const { return reinterpret_cast<float*>(base + crosses_at); }
  // b.(A A^T b), and the sum of |b_k| |A_k|: [rows][2].
  FLATKERN_HD double* forms() const { return reinterpret_cast<double*>(base + forms_at); }
  // How many panels of a block of rows are done.
  FLATKERN_HD uint32_t* done() const { return reinterpret_cast<uint32_t*>(base + done_at); }
};

FLATKERN_HD NormScratch scratch_of(const RowNormArgs& args) {
  const int own_rows = norm_rows(args.weight_dtype), group = norm_blocks(args.rank);
  NormScratch s;
  s.base = args.scratch;
  s.row_blocks = divide_up(args.rows, own_rows);
  s.rows = s.row_blocks * own_rows;
  s.panels = args.cols == 0 ? 1 : static_cast<int>(divide_up(args.cols, kPanelCols));
  s.blocks = group == 0 ? 0 : static_cast<int>(divide_up(args.rank, group * kRankBlock)) * group;
  s.ranks = s.blocks * kRankBlock;
  s.gram_parts = s.blocks == 0 || s.blocks > 8 ? 1 : 8 / s.blocks;
  s.bytes = 0;
  const auto take = [&](uint64_t size) {
    const uint64_t at = s.bytes;
    s.bytes += (size + 127) / 128 * 128;
    return at;
  };
  s.words_at = take(uint64_t{16} * s.panels * kPanelSteps * s.blocks * kStepWords);
  s.gram_at = take(uint64_t{8} * s.gram_parts * s.ranks * s.ranks);
  s.lora_B_at = take(uint64_t{4} * s.rows * s.ranks);
  s.squares_at = take(uint64_t{4} * s.panels * s.rows);
  s.crosses_at = take(uint64_t{4} * s.panels * s.rows);
  s.forms_at = take(uint64_t{16} * s.rows);
  s.done_at = take(uint64_t{4} * s.row_blocks);
  return s;
}

// One element of an adapter in float32.
FLATKERN_HD float adapter_at(const Adapter& adapter, int64_t row, int64_t col) {
  const int64_t at = row * adapter.row_stride + col * adapter.col_stride;
  switch (adapter.dtype) {
    case Dtype::kBFloat16:
      return to_float(static_cast<const BFloat16*>(adapter.data)[at]);
    case Dtype::kFloat16:
      return to_float(static_cast<const Float16*>(adapter.data)[at]);
    default:
      return static_cast<const float*>(adapter.data)[at];
  }
}

// Relative errors of the three summands, of |w|^2, |w| u and u^2 with u = sum of |b_k| |A_k|, and
// what the sum may be off by: 9.5e-6 of the norm. docs/row_norm.md derives them.
constexpr double kSquareError = 1e-6, kFormError = 1e-12, kSumError = 1.9e-5;
FLATKERN_HD constexpr double cross_error(int blocks) { return 2.75e-6 + 1.2e-7 * blocks; }

// Whether the square of a norm stands: false for NaN, too, and where float32 may have overflowed or
// lost bits.
FLATKERN_HD bool is_accurate(double sum, double squares, double u, int blocks) {
  const double error =
      kSquareError * squares + 2.0 * cross_error(blocks) * sqrt(squares) * u + kFormError * u * u;
  return sum > 1e-28 && sum < 1e37 && error <= kSumError * sum;
}

// Whether a row of A with this norm can be split: its products neither overflow nor lose bits.
FLATKERN_HD bool splits(double norm) { return norm > 1e-12 && norm < 1e15; }

// The sum over the warp, the same tree and so the same bits for every caller.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}

// Fills the scratch of a table's tensors.
void launch_row_norm_prepare(const Table<RowNormArgs>& table, cudaStream_t stream);

}  // namespace flatkern::cuda

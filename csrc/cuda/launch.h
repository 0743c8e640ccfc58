// Launch shapes: pure functions of sizes, tested on the host.
#pragma once

#include "../philox.h"

namespace flatkern::cuda {

constexpr int kWarp = 32;
// Columns that a thread handles at once: 128 bits of a 16-bit dtype, two Philox calls.
constexpr int kVector = 8;
// Columns that a warp covers at once.
constexpr int kWarpCols = kWarp * kVector;
// Elementwise kernels: a warp's work unit is a row's next kUnitCols columns. Longer units amortise
// the row's hoisted rounds, shorter ones balance.
constexpr int kUnitSteps = 16;
constexpr int64_t kUnitCols = static_cast<int64_t>(kUnitSteps) * kWarpCols;
constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;
// Blocks of kThreads that an SM holds at up to 64 registers a thread.
constexpr int kBlocksPerSm = 4;

FLATKERN_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

FLATKERN_HD constexpr int64_t units_per_row(int64_t cols) { return divide_up(cols, kUnitCols); }

// Blocks for `warps` warps of work, each of which may loop: no more than the device holds at once.
constexpr int grid_blocks(int64_t warps, int sm_count) {
  const int64_t needed = divide_up(warps, kWarpsPerBlock);
  const int64_t held = static_cast<int64_t>(sm_count) * kBlocksPerSm;
  return static_cast<int>(needed < held ? needed : held);
}

// Row norm: rows of a warp, which share its loads of A. One where more would leave SMs idle.
constexpr int kNormRows = 4;
constexpr bool norm_shares_rows(int64_t rows, int sm_count) {
  return rows >= static_cast<int64_t>(kNormRows) * kWarpsPerBlock * sm_count;
}

// Adapters up to this rank are multiplied by FMAs in float32, beyond on tensor cores.
constexpr int kDirectRank = 16;

// Row norm on tensor cores: a block takes one or two tiles of kMmaRows rows. Two share the loads
// and the splitting of A; they cost no time where some SM has two tiles to do anyway.
constexpr int kMmaRows = 16;
constexpr int mma_tiles(int64_t rows, int sm_count) {
  return divide_up(rows, kMmaRows) > sm_count ? 2 : 1;
}

// Fused row norm and perturbation: a block holds kFusedRows whole rows in registers, kVector
// columns of each row a thread.
constexpr int kFusedRows = 4;
constexpr int kFusedThreads = 512;
constexpr bool fuses(int64_t cols, int64_t rank, bool aligned) {
  return aligned && cols <= static_cast<int64_t>(kFusedThreads) * kVector && rank <= kDirectRank;
}
// Whole warps that cover the row.
constexpr int fused_threads(int64_t cols) {
  return static_cast<int>(divide_up(cols, kWarpCols)) * kWarp;
}

// Residual: the block that compares a header, most of which is summing up the row scale.
constexpr int kBeginThreads = 512;

}  // namespace flatkern::cuda

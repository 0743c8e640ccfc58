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

// Residual: the block that compares a header, most of which is summing up the row scale.
constexpr int kBeginThreads = 512;

}  // namespace flatkern::cuda

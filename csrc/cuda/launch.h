// Launch shapes: pure functions of sizes, tested on the host.
#pragma once

#include "../philox.h"

namespace flatkern::cuda {

constexpr int kWarp = 32;
// Columns that a thread handles at once: 128 bits of a 16-bit dtype, two Philox calls.
constexpr int kVector = 8;
// Columns that a warp covers at once.
constexpr int kWarpCols = kWarp * kVector;
constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;
// Blocks of kThreads that an SM holds at up to 64 registers a thread.
constexpr int kBlocksPerSm = 4;

FLATKERN_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elementwise kernels: a warp has one unit, a row's next 2^log2 columns, and waits for its vectors
// two loads ahead. Three blocks of such warps, at up to 80 registers a thread, keep the memory
// busy.
constexpr int kPerturbBlocksPerSm = 3;
// A long unit pays for the row's hoisted rounds more often than a short one.
constexpr int kLongUnitLog2 = 12, kShortUnitLog2 = 11;

FLATKERN_HD constexpr int64_t units_per_row(int64_t cols, int log2) {
  return (cols + (int64_t{1} << log2) - 1) >> log2;
}

// Short, where the device is through with so few long units that it waits for the last of them.
constexpr int unit_log2(int64_t long_units, int sm_count) {
  const int64_t held = static_cast<int64_t>(sm_count) * kPerturbBlocksPerSm * kWarpsPerBlock;
  return long_units < 8 * held ? kShortUnitLog2 : kLongUnitLog2;
}

// A warp for every unit of a weight; no blocks where it has no elements.
struct UnitGrid {
  int log2, blocks;
};
constexpr UnitGrid unit_grid(int64_t rows, int64_t cols, int sm_count) {
  const int log2 = unit_log2(rows * units_per_row(cols, kLongUnitLog2), sm_count);
  const int64_t units = rows * units_per_row(cols, log2);
  return {log2, static_cast<int>(divide_up(units, kWarpsPerBlock))};
}

struct Unit {
  int64_t row, begin, end;  // columns [begin, end); none where `row` is past the last
};

// Unit number `index` of a weight. Divides in 32 bits, because a division in 64 is a call, around
// which registers spill: a weight of 2^32 units would have 2^42 elements.
FLATKERN_HD Unit unit_of(int64_t rows, int64_t cols, int log2, uint64_t index) {
  const uint32_t per_row = static_cast<uint32_t>(units_per_row(cols, log2));
  if (index >= static_cast<uint64_t>(rows) * per_row) return {rows, 0, 0};
  const uint32_t row = static_cast<uint32_t>(index) / per_row;
  const int64_t begin = static_cast<int64_t>(static_cast<uint32_t>(index) - row * per_row) << log2;
  const int64_t end = begin + (int64_t{1} << log2);
  return {row, begin, end < cols ? end : cols};
}

// Blocks for `warps` warps of work, each of which may loop: no more than the device holds at once.
constexpr int grid_blocks(int64_t warps, int sm_count) {
  const int64_t needed = divide_up(warps, kWarpsPerBlock);
  const int64_t held = static_cast<int64_t>(sm_count) * kBlocksPerSm;
  return static_cast<int>(needed < held ? needed : held);
}

// Residual: the block that compares a header, most of which is summing up the row scale.
constexpr int kBeginThreads = 512;

}  // namespace flatkern::cuda

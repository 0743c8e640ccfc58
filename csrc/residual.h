// The layout of a residual: chunks, directory and pool. Host and device.
//
// What it means is written down in flatkern/reference/residual.py; flatkern/ops/_residual.py keeps
// the header, of which kernels write the counters alone.
#pragma once

#include <cstdint>

#include "philox.h"

namespace flatkern {

constexpr int64_t kChunk = 4096;
constexpr int64_t kResidualHeader = 128;
// Byte offsets of the counters.
constexpr int64_t kResidualAsked = 80, kResidualClean = 88, kResidualMismatched = 96;
// A directory entry is word_offset << 2 | mode.
constexpr uint64_t kMaxPayloadOffset = uint64_t{1} << 30;
constexpr uint32_t kCheckMultiplier = 0x9E3779B1u;
// Low bits that all codes of a chunk share as zeros: float32 that holds 16-bit values.
constexpr int kMinGrid = 8, kMaxGrid = 16;

enum class ChunkMode : uint32_t { kClean, kPacked, kGrid, kRaw };

// Elements of a chunk are adjacent in row-major order: part of a row, or whole short rows.
struct ChunkSpan {
  int64_t row, rows, begin, cols;
  FLATKERN_HD int64_t count() const { return rows * cols; }
};

struct Chunks {
  int64_t rows, cols;

  FLATKERN_HD int64_t rows_per_chunk() const {
    return cols >= kChunk || cols == 0 ? 1 : kChunk / cols;
  }
  FLATKERN_HD int64_t per_row() const { return (cols + kChunk - 1) / kChunk; }
  FLATKERN_HD int64_t count() const {
    return (rows + rows_per_chunk() - 1) / rows_per_chunk() * per_row();
  }
  FLATKERN_HD ChunkSpan span(int64_t chunk) const {
    const int64_t row = chunk / per_row() * rows_per_chunk();
    const int64_t begin = chunk % per_row() * kChunk;
    const int64_t rows_left = rows - row, cols_left = cols - begin;
    return {row, rows_left < rows_per_chunk() ? rows_left : rows_per_chunk(), begin,
            cols_left < kChunk ? cols_left : kChunk};
  }
  // Bytes of the directory, padded.
  FLATKERN_HD int64_t directory_bytes() const { return (4 * count() + 15) / 16 * 16; }
};

}  // namespace flatkern

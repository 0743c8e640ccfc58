// The layout of a residual, and its header, which every kernel compares with its call before it
// writes anything: then no call waits for a copy to the host. Host and device.
//
// What it means is written down in flatkern/reference/residual.py and header.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "args.h"

namespace flatkern {

constexpr int64_t kChunk = 4096;
constexpr int64_t kResidualHeader = 128;
constexpr uint32_t kResidualMagic = 0x31524B46u;  // FKR1
constexpr uint16_t kResidualVersion = 1;
enum ResidualState : uint32_t { kEmpty, kFilled };

// Why a call wrote nothing: bits of `refused`, in the order of REFUSALS in reference/header.py.
enum Refusal : uint32_t {
  kOtherBytes = 1u << 0,
  kOtherWeight = 1u << 1,
  kAlreadyFilled = 1u << 2,
  kNotFilled = 1u << 3,
  kOtherImplementation = 1u << 4,
  kOtherElementwise = 1u << 5,
  kOtherRowOffset = 1u << 6,
  kOtherColOffset = 1u << 7,
  kOtherSeed = 1u << 8,
  kOtherStep = 1u << 9,
  kOtherDraw = 1u << 10,
  kOtherTensor = 1u << 11,
  kOtherRowScale = 1u << 12,
};

// As Header in flatkern/reference/header.py; zeros follow.
struct ResidualHeader {
  uint32_t magic;
  uint16_t version;
  uint8_t dtype, elementwise;
  uint64_t rows, cols, row_offset, col_offset;
  uint32_t seed, step, draw, tensor;
  uint64_t implementation, row_scale;
  uint64_t capacity, asked;  // words
  uint32_t clean, state, mismatched;
  uint32_t refused;
};
static_assert(offsetof(ResidualHeader, seed) == 40 && offsetof(ResidualHeader, asked) == 80 &&
              offsetof(ResidualHeader, refused) == 100 &&
              sizeof(ResidualHeader) <= kResidualHeader);

// Of the digest of a row scale: a sum over its bits, each mixed with its position, modulo 2^64,
// which `header_of` multiplies once more.
FLATKERN_HD uint64_t mixed_scale(float row_scale, int64_t row) {
  uint64_t x = static_cast<uint64_t>(row + 1) * 0x1E3779B97F4A7C15u;
  x += static_cast<int64_t>(static_cast<int32_t>(bits_of_float(row_scale)));
  x *= 0x3F58476D1CE4E5B9u;
  return x ^ static_cast<uint64_t>(static_cast<int64_t>(x) >> 31);
}

// The header that a perturbation with these arguments leaves, before its chunks count; `scales` is
// the sum of mixed_scale.
template <class Key>
FLATKERN_HD ResidualHeader header_of(const PerturbArgs<Key>& perturb, const NoiseKey& key,
                                     uint64_t scales, uint64_t implementation, uint64_t capacity) {
  const Block<Key>& block = perturb.block;
  ResidualHeader header = {};
  header.magic = kResidualMagic;
  header.version = kResidualVersion;
  header.dtype = static_cast<uint8_t>(perturb.weight_dtype);
  header.elementwise = perturb.elementwise;
  header.rows = static_cast<uint64_t>(block.rows);
  // A weight without rows has no columns either: Layout in reference/residual.py.
  header.cols = block.rows == 0 ? 0 : static_cast<uint64_t>(block.cols);
  header.row_offset = block.row_offset;
  header.col_offset = block.col_offset;
  header.seed = key.seed;
  header.step = key.step;
  header.draw = key.draw;
  header.tensor = key.tensor;
  header.implementation = implementation;
  header.row_scale = scales * 0x9E3779B97F4A7C15u;
  header.capacity = capacity;
  header.state = kFilled;
  return header;
}

// Why the call must write nothing: bits of Refusal.
FLATKERN_HD uint32_t refusal_of(const ResidualHeader& now, const ResidualHeader& then,
                                bool restore) {
  const auto differs = [](bool equal, Refusal why) -> uint32_t { return equal ? 0u : why; };
  if (now.magic != then.magic || now.version != then.version) return kOtherBytes;
  if (now.dtype != then.dtype || now.rows != then.rows || now.cols != then.cols ||
      now.capacity != then.capacity) {
    return kOtherWeight;
  }
  if (!restore) return differs(then.state == kEmpty, kAlreadyFilled);
  if (then.state != kFilled) return kNotFilled;
  return differs(now.implementation == then.implementation, kOtherImplementation) |
         differs(now.elementwise == then.elementwise, kOtherElementwise) |
         differs(now.row_offset == then.row_offset, kOtherRowOffset) |
         differs(now.col_offset == then.col_offset, kOtherColOffset) |
         differs(now.seed == then.seed, kOtherSeed) | differs(now.step == then.step, kOtherStep) |
         differs(now.draw == then.draw, kOtherDraw) |
         differs(now.tensor == then.tensor, kOtherTensor) |
         differs(now.row_scale == then.row_scale, kOtherRowScale);
}

// What a call that was not refused notes before its chunks. A restored residual counts as empty
// until a chunk says that it was left out.
FLATKERN_HD void begin(ResidualHeader& header, const ResidualHeader& now, bool restore) {
  if (!restore) {
    header = now;
    return;
  }
  header.mismatched = 0;
  header.refused = 0;
  header.state = kEmpty;
}

// A directory entry is word_offset << 2 | mode.
constexpr uint64_t kMaxPayloadOffset = uint64_t{1} << 30;
constexpr uint32_t kCheckMultiplier = 0x9E3779B1u;
// Low bits that all codes of a chunk share as zeros: float32 that holds 16-bit values.
constexpr int kMinGrid = 8, kMaxGrid = 16;

// Bits of the significand, and 2^E for the smallest exponent that a gap is taken from.
template <class T>
struct Precision;
template <>
struct Precision<BFloat16> {
  static constexpr uint32_t kBits = 8, kMinExponent = 27u << 23;
};
template <>
struct Precision<Float16> {
  static constexpr uint32_t kBits = 11, kMinExponent = 113u << 23;
};
template <>
struct Precision<float> {
  static constexpr uint32_t kBits = 24, kMinExponent = 27u << 23;
};

// Words of a list entry: position and code share one where the code has 16 bits.
template <class T>
constexpr uint32_t kEntryWords = sizeof(T) == 4 ? 2 : 1;

// Words of a chunk in mode RAW: the check word, then W.
template <class T>
FLATKERN_HD constexpr uint32_t raw_words(uint32_t count) {
  return 1 + (count * static_cast<uint32_t>(sizeof(T)) + 3) / 4;
}

enum class ChunkMode : uint32_t { kClean, kPacked, kGrid, kRaw };

// Elements of a chunk are adjacent in row-major order: part of a row, or whole short rows.
struct ChunkSpan {
  int64_t row, begin;
  uint32_t rows, cols;
  FLATKERN_HD uint32_t count() const { return rows * cols; }
};

struct Chunks {
  int64_t rows, cols;

  FLATKERN_HD uint32_t rows_per_chunk() const {
    return cols >= kChunk || cols == 0
               ? 1
               : static_cast<uint32_t>(kChunk) / static_cast<uint32_t>(cols);
  }
  FLATKERN_HD uint32_t per_row() const {
    return static_cast<uint32_t>((cols + kChunk - 1) / kChunk);
  }
  FLATKERN_HD int64_t count() const {
    return (rows + rows_per_chunk() - 1) / rows_per_chunk() * per_row();
  }
  FLATKERN_HD ChunkSpan span(uint32_t chunk) const {
    const int64_t row = static_cast<int64_t>(chunk / per_row()) * rows_per_chunk();
    const int64_t begin = static_cast<int64_t>(chunk % per_row()) * kChunk;
    const int64_t rows_left = rows - row, cols_left = cols - begin;
    return {row, begin,
            static_cast<uint32_t>(rows_left < rows_per_chunk() ? rows_left : rows_per_chunk()),
            static_cast<uint32_t>(cols_left < kChunk ? cols_left : kChunk)};
  }
  // Bytes of the directory, padded.
  FLATKERN_HD int64_t directory_bytes() const { return (4 * count() + 15) / 16 * 16; }
};

}  // namespace flatkern

// What the CUDA kernels take, and their launchers: torch-free, on raw device pointers. The key is
// read on the device, so nothing here synchronises and every launch can be captured in a graph.
#pragma once

#include <vector>

#include "../args.h"
#include "../residual.h"
#include "runtime.h"
#include "table.h"

namespace flatkern::cuda {

// The key is (seed, step, draw, tensor) on the device.
using Block = flatkern::Block<const int64_t*>;
using NoiseArgs = flatkern::NoiseArgs<const int64_t*>;
using PerturbArgs = flatkern::PerturbArgs<const int64_t*>;
using PlaneArgs = flatkern::PlaneArgs<const int64_t*>;

// An adapter as it lies in memory.
struct Adapter {
  const void* data;
  Dtype dtype;
  int64_t row_stride, col_stride;
};

struct RowNormArgs {
  int64_t rows, cols, rank;
  const void* weight;
  Dtype weight_dtype;
  int64_t weight_stride;
  Adapter lora_A, lora_B;  // [rank, cols] and [rows, rank]; of rank 0 nobody reads them
  float scaling;
  float relative_scale;  // norm times this is written: 1, or sigma / sqrt(n)
  float* norm;           // [rows]
  char* scratch;         // set by the launcher
};

// The chunks of a weight, as `Chunks` has them, for blocks: the division by the chunks of a row is
// a product with what the host has computed (Granlund and Montgomery, "Division by invariant
// integers using multiplication", PLDI 1994, for dividends below 2^31).
struct ChunkFinder {
  uint32_t multiplier;  // ceil(2^(31 + shift) / chunks of a row)
  uint16_t shift;       // 2^shift is no less than these
  uint16_t rows;        // of a chunk

  // Of a weight with so many rows and columns.
  FLATKERN_HD ChunkSpan span(int64_t all_rows, int64_t all_cols, uint32_t chunk) const {
    const uint64_t product = static_cast<uint64_t>(chunk) * multiplier;
    const uint32_t across = static_cast<uint32_t>(product >> 31 >> shift);
    const uint32_t per_row = static_cast<uint32_t>(static_cast<uint64_t>(all_cols + kChunk - 1) /
                                                   static_cast<uint64_t>(kChunk));
    const int64_t row = static_cast<int64_t>(static_cast<uint64_t>(across) * rows);
    const int64_t begin = static_cast<int64_t>(chunk - across * per_row) * kChunk;
    const int64_t rows_left = all_rows - row, cols_left = all_cols - begin;
    return {row, begin, rows_left < rows ? static_cast<uint32_t>(rows_left) : rows,
            static_cast<uint32_t>(cols_left < kChunk ? cols_left : kChunk)};
  }
};

inline ChunkFinder chunk_finder(const Chunks& chunks) {
  const uint64_t per_row = chunks.per_row() == 0 ? 1 : chunks.per_row();
  uint16_t shift = 0;
  while (uint64_t{1} << shift < per_row) ++shift;
  return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + per_row - 1) / per_row), shift,
          static_cast<uint16_t>(chunks.rows_per_chunk())};
}

struct ResidualArgs {
  PerturbArgs perturb;  // in place: out is what is read and written
  ResidualHeader* header;
  uint32_t* pool;  // [capacity]
  uint64_t capacity;
  uint64_t implementation;
  ChunkFinder finder;

  Chunks chunks() const { return {perturb.block.rows, perturb.block.cols}; }
  FLATKERN_HD ChunkSpan span(uint32_t chunk) const {
    return finder.span(perturb.block.rows, perturb.block.cols, chunk);
  }
  // [chunks], behind the header.
  FLATKERN_HD uint32_t* directory() const {
    return reinterpret_cast<uint32_t*>(header) + kResidualHeader / 4;
  }
};

void launch_philox_bits(const NoiseArgs& args, int sm_count, cudaStream_t stream);
void launch_noise(const NoiseArgs& args, int sm_count, cudaStream_t stream);
void launch_uniform(const NoiseArgs& args, int sm_count, cudaStream_t stream);
void launch_perturb_plane(const PlaneArgs& args, int sm_count, cudaStream_t stream);

// Several tensors, which share no memory that is written, in few launches.
void launch_perturb(const std::vector<PerturbArgs>& tensors, int sm_count, cudaStream_t stream);
void launch_restore(const std::vector<PerturbArgs>& tensors, int sm_count, cudaStream_t stream);
// With so many bytes of scratch, 16-byte aligned and not initialised; they are free again behind
// the launches.
int64_t row_norm_scratch(const std::vector<RowNormArgs>& tensors);
void launch_row_norm(const std::vector<RowNormArgs>& tensors, void* scratch, cudaStream_t stream);

// Several tensors, which share neither weights nor residuals. What a header does not allow writes
// nothing to its tensor and leaves its reason there.
void launch_perturb_residual(const std::vector<ResidualArgs>& tensors, int sm_count,
                             cudaStream_t stream);
void launch_restore_residual(const std::vector<ResidualArgs>& tensors, int sm_count,
                             cudaStream_t stream);

}  // namespace flatkern::cuda

// What the CPU kernels take, and the table of them that each instruction set fills.
//
// Kernels are torch-free functions over a range of work units, so that the caller owns threading.
// Results do not depend on how the range is cut.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "../args.h"
#include "../residual.h"

// AVX2 and AVX-512 beside the portable kernels, in one build and without -march.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FLATKERN_MULTI_ISA
#endif

namespace flatkern::cpu {

using Block = Block<NoiseKey>;
using NoiseArgs = flatkern::NoiseArgs<NoiseKey>;
using PerturbArgs = flatkern::PerturbArgs<NoiseKey>;
using PlaneArgs = flatkern::PlaneArgs<NoiseKey>;

struct RowNormArgs {
  int64_t rows, cols, rank;
  const void* weight;
  Dtype weight_dtype;
  int64_t weight_stride;
  const float* lora_A;    // [rank, lora_A_stride], zeros past cols
  int64_t lora_A_stride;  // cols rounded up to kNormLanes
  const float* lora_B;    // [rows, rank], times scaling
  float relative_scale;   // norm times this is written: 1, or sigma / sqrt(n)
  float* norm;            // [rows]
};

struct PerturbMergedArgs {
  PerturbArgs perturb;   // row_scale points at row_norm.norm
  RowNormArgs row_norm;  // relative_scale makes norm the row scale
};

struct ResidualArgs {
  PerturbArgs perturb;  // in place
  Chunks chunks;
  uint32_t* directory;  // [chunks]
  uint32_t* pool;       // [capacity]
  uint64_t capacity;
  std::atomic<uint64_t>* asked;     // words that chunks asked for
  std::atomic<uint32_t>* left_out;  // chunks without room, or refused by a restore
};

// Elementwise kernels take units of (row, block of kBlockCols columns); row kernels take rows,
// residual kernels chunks.
constexpr int64_t kBlockCols = 4096;

// Squares are summed in this many float lanes whatever the vector width, so that every width
// gives the same bits, and moved on to float64 now and then.
constexpr int kNormLanes = 16;

inline int64_t blocks_per_row(int64_t cols) { return (cols + kBlockCols - 1) / kBlockCols; }

struct Kernels {
  const char* name;
  void (*philox_bits)(const NoiseArgs&, int64_t begin, int64_t end);
  void (*noise)(const NoiseArgs&, int64_t begin, int64_t end);
  void (*uniform)(const NoiseArgs&, int64_t begin, int64_t end);
  void (*perturb)(const PerturbArgs&, int64_t begin, int64_t end);
  void (*restore)(const PerturbArgs&, int64_t begin, int64_t end);
  void (*perturb_plane)(const PlaneArgs&, int64_t begin, int64_t end);
  void (*row_norm)(const RowNormArgs&, int64_t begin, int64_t end);
  void (*perturb_merged)(const PerturbMergedArgs&, int64_t begin, int64_t end);
  void (*perturb_residual)(const ResidualArgs&, int64_t begin, int64_t end);
  void (*restore_residual)(const ResidualArgs&, int64_t begin, int64_t end);
};

// The table for one instruction set, or null where it was not compiled.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The widest that this processor runs, chosen once; FLATKERN_CPU_ISA names a narrower one.
const Kernels& kernels();

}  // namespace flatkern::cpu

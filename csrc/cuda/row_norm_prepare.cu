// What the row norms of a list's tensors need beside W: A in bfloat16 parts, A A^T, and sB.
#include "row_norm.h"

namespace flatkern::cuda {

// Columns of A in shared memory at a time.
constexpr int kGramCols = 64;

// The blocks of a tensor: those for A A^T, for A's parts, and for sB and the counters.
struct PrepareBlocks {
  uint32_t gram, words, lora_B;

  FLATKERN_HD explicit PrepareBlocks(const NormScratch& scratch)
      : gram(static_cast<uint32_t>(scratch.blocks * scratch.blocks * scratch.gram_parts)),
        words(static_cast<uint32_t>(scratch.panels * kPanelSteps * scratch.blocks * 2 * kWarp /
                                    kThreads)),
        lora_B(static_cast<uint32_t>(1 +
                                     (scratch.rows * (scratch.ranks + 1) - 1) / (16 * kThreads))) {}
};

// One part of the columns of 16 by 16 products of rows of A, a thread each.
__device__ void prepare_gram(const RowNormArgs& args, const NormScratch& scratch, uint32_t block) {
  __shared__ double rows[2][kRankBlock][kGramCols + 1];
  const uint32_t part = block % scratch.gram_parts, pair = block / scratch.gram_parts;
  const uint32_t first[2] = {pair / scratch.blocks * kRankBlock,
                             pair % scratch.blocks * kRankBlock};
  const int64_t share = divide_up(args.cols, kGramCols * scratch.gram_parts) * kGramCols;
  const int64_t begin = part * share;
  const int64_t end = begin + share < args.cols ? begin + share : args.cols;
  double sum = 0.0;
  for (int64_t j = begin; j < end; j += kGramCols) {
    for (int i = threadIdx.x; i < 2 * kRankBlock * kGramCols; i += kThreads) {
      const int side = i / (kRankBlock * kGramCols), k = i / kGramCols % kRankBlock;
      const int64_t col = j + i % kGramCols, rank = first[side] + k;
      rows[side][k][i % kGramCols] =
          rank < args.rank && col < end ? adapter_at(args.lora_A, rank, col) : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int i = 0; i < kGramCols; ++i) {
      sum = fma(rows[0][threadIdx.x / kRankBlock][i], rows[1][threadIdx.x % kRankBlock][i], sum);
    }
    __syncthreads();
  }
  scratch.gram()[static_cast<uint64_t>(block) * kThreads + threadIdx.x] = sum;
}

// A's parts as left operands, a lane's four words of each part: the columns of a step come in an
// order of our own, in which a lane's eight columns of W are adjacent. With g = lane / 4 and
// t = lane % 4, the columns 2t, 2t + 1 of a product are 8t + 4 half + {0, 1} of the step, and those
// 8 further on are the next two.
__device__ void prepare_words(const RowNormArgs& args, const NormScratch& scratch,
                              uint32_t thread) {
  const uint32_t lane = thread % kWarp, half = thread / kWarp % 2;
  const uint32_t item = thread / (2 * kWarp);  // [groups][steps][blocks of a group]
  const uint32_t group = norm_blocks(args.rank), steps = scratch.panels * kPanelSteps;
  const uint32_t block = item / group / steps * group + item % group;
  const uint32_t step = item / group % steps;
  const int64_t rank = block * kRankBlock + lane / 4;
  const int64_t col = static_cast<int64_t>(step) * kStepCols + lane % 4 * 8 + half * 4;
  Bits128* to = scratch.words() + static_cast<uint64_t>(item) * kStepWords + half * kWarp + lane;
  Bits128 part[kParts];
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const int64_t k = rank + word % 2 * 8, j = col + word / 2 * 2;
    float a[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i] = k < args.rank && j + i < args.cols ? adapter_at(args.lora_A, k, j + i) : 0.0f;
    }
    split_pair(a[0], a[1], part[0].w[word], part[1].w[word], part[2].w[word]);
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) to[p * 2 * kWarp] = part[p];
}

__device__ void prepare_lora_B(const RowNormArgs& args, const NormScratch& scratch, int64_t thread,
                               int64_t threads) {
  for (int64_t i = thread; i < scratch.row_blocks; i += threads) scratch.done()[i] = 0;
  for (int64_t i = thread; i < scratch.rows * scratch.ranks; i += threads) {
    const int64_t row = i / scratch.ranks, k = i % scratch.ranks;
    scratch.lora_B()[i] =
        row < args.rows && k < args.rank ? adapter_at(args.lora_B, row, k) * args.scaling : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads)
    row_norm_prepare_kernel(const __grid_constant__ Table<RowNormArgs> table) {
  const Place place = place_of(table, blockIdx.x);
  const RowNormArgs& args = table.tensors[place.tensor];
  const NormScratch scratch = scratch_of(args);
  const PrepareBlocks blocks(scratch);
  if (place.block < blocks.gram) return prepare_gram(args, scratch, place.block);
  const uint32_t block = place.block - blocks.gram;
  if (block < blocks.words) return prepare_words(args, scratch, block * kThreads + threadIdx.x);
  prepare_lora_B(args, scratch, static_cast<int64_t>(block - blocks.words) * kThreads + threadIdx.x,
                 static_cast<int64_t>(blocks.lora_B) * kThreads);
}

void launch_row_norm_prepare(const Table<RowNormArgs>& table, cudaStream_t stream) {
  Table<RowNormArgs> prepared = table;
  for (uint32_t i = 0; i < table.count; ++i) {
    const PrepareBlocks blocks(scratch_of(table.tensors[i]));
    prepared.first_block[i + 1] =
        prepared.first_block[i] + blocks.gram + blocks.words + blocks.lora_B;
  }
  const int grid = static_cast<int>(prepared.blocks());
  FLATKERN_LAUNCH(row_norm_prepare_kernel, grid, kThreads, stream, prepared);
}

}  // namespace flatkern::cuda

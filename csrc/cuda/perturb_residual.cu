// Perturb that fills a residual: a block per chunk of 4096 elements, which stays in registers.
#include "residual.h"

namespace flatkern::cuda {

// What a thread has found in a vector.
struct VectorFields {
  uint32_t quads[kQuads], bits[kQuads];  // four fields end to end, and their bits
  uint32_t listed, missing;              // by element
};

// Empties the fields of a pair that its ranges miss; those, as bits.
FLATKERN_HD uint32_t drop_missed(uint32_t codes, const Bracket& pair, uint32_t& field) {
  const uint32_t first = (codes & 0xFFFFu) - (pair.base & 0xFFFFu);
  const uint32_t second = (codes >> 16) - (pair.base >> 16);
  const bool misses_first = first > (pair.span & 0xFFFFu), misses_second = second > pair.span >> 16;
  field = pair_of(misses_first ? 0 : first, misses_second ? 0 : second);
  return misses_first | misses_second << 1;
}

// W's index in each range, 0 where that misses it; the missed, as bits.
template <class T>
FLATKERN_HD uint32_t find_indices(const Packed<T>& weight, const Ranges<T>& ranges,
                                  uint32_t* index) {
  uint32_t missed = 0;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      index[i] = code_at(weight, i) - ranges.word[i].base;
      if (index[i] <= ranges.word[i].span) continue;
      index[i] = 0;
      missed |= 1u << i;
    }
  } else {
    uint32_t beyond = 0;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      index[i] = weight.bits[0].w[i] - ranges.word[i].base;
      // What is below the base or above the top borrows, and leaves more than a byte.
      beyond |= index[i] | (ranges.word[i].span - index[i]);
    }
    if ((beyond & kBeyondByte) != 0) {
#pragma unroll
      for (int i = 0; i < kVector / 2; ++i) {
        missed |= drop_missed(weight.bits[0].w[i], ranges.word[i], index[i]) << 2 * i;
      }
    }
  }
  return missed;
}

template <class T, bool Elementwise>
FLATKERN_HD VectorFields find_fields(const Packed<T>& weight, const Packed<T>& noisy,
                                     const float* e, uint32_t grid) {
  const Ranges<T> ranges = ranges_of<T, Elementwise>(noisy, e);
  uint32_t index[Ranges<T>::kWords];
  VectorFields found;
  found.listed = find_indices(weight, ranges, index);
  found.missing = 0;
  if constexpr (sizeof(T) == 4) {
    if (grid != 0) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float s = float_of_bits(code_at(noisy, i));
        if (round_to_grid(s, e[i], grid) != code_at(weight, i)) found.missing |= 1u << i;
      }
    }
  }
  const Widths<T> widths = widths_of(ranges);
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    found.quads[quad] = widths.join(index, quad);
    found.bits[quad] = widths.bits(quad);
  }
  return found;
}

FLATKERN_HD uint32_t count_ones(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Low bits that are zero in every code of the chunk, at most kMaxGrid; 0 where GRID cannot be.
__device__ __forceinline__ uint32_t common_zeros(const Packed<float>* weight, uint32_t* of_warps) {
  uint32_t all = 0;
  for (int v = 0; v < kThreadVectors<float>; ++v) {
    for (int i = 0; i < kVector; ++i) all |= code_at(weight[v], i);
  }
  all = __reduce_or_sync(kWholeWarp, all);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = all;
  __syncthreads();
  all = 1u << kMaxGrid;
  for (int w = 0; w < kChunkWarps<float>; ++w) all |= of_warps[w];
  // The lowest bit that is set: its number is the bits of what lies below.
  const uint32_t zeros = width_of((all & (0u - all)) - 1u);
  return zeros < kMinGrid ? 0 : zeros;
}

// A word's fields, from bit `at` of the stream on.
__device__ __forceinline__ void put_word(uint32_t* stream, uint32_t at, uint32_t fields) {
  if (fields == 0) return;
  const uint64_t shifted = static_cast<uint64_t>(fields) << (at % 32);
  uint32_t* word = stream + at / 32;
  atomicOr(word, low(shifted));
  if (high(shifted) != 0) atomicOr(word + 1, high(shifted));
}

// All fields of a thread, `bits` of them: seldom more than a word.
template <class T>
__device__ __forceinline__ void put_fields(uint32_t* stream, uint32_t at, const VectorFields* found,
                                           uint32_t bits) {
  if (bits <= 32) {
    uint32_t all = 0, filled = 0;
#pragma unroll
    for (int i = 0; i < kThreadVectors<T> * kQuads; ++i) {
      all |= found[i / kQuads].quads[i % kQuads] << filled % 32;
      filled += found[i / kQuads].bits[i % kQuads];
    }
    put_word(stream, at, all);
  } else {
#pragma unroll
    for (int i = 0; i < kThreadVectors<T> * kQuads; ++i) {
      put_word(stream, at, found[i / kQuads].quads[i % kQuads]);
      at += found[i / kQuads].bits[i % kQuads];
    }
  }
}

// The thread's elements that are listed, as bits. They are read again: W is still in its place.
template <class T, bool Vector>
__device__ __forceinline__ void put_list(uint32_t* to, const Tile<T, Vector>& tile,
                                         uint32_t listed) {
#pragma unroll 1
  for (; listed != 0; listed &= listed - 1) {
    const uint32_t position = tile.first + width_of(listed & (0u - listed)) - 1;
    const uint32_t code = code_of(*tile.at(position));
    if constexpr (sizeof(T) == 2) {
      *to++ = position << 16 | code;
    } else {
      *to++ = position;
      *to++ = code;
    }
  }
}

// Vector: see Tile.
template <class T, bool Elementwise, bool Vector>
__global__ void __launch_bounds__(kChunkThreads<T>)
    perturb_residual_kernel(const __grid_constant__ Table<ResidualArgs> table) {
  // float32 has no bits to spare for elementwise noise: raw.
  constexpr bool kPacks = !(Elementwise && sizeof(T) == 4);
  alignas(16) __shared__ uint32_t stream[kStreamRoom];
  __shared__ uint32_t totals[kChunkWarps<T>], checks[kChunkWarps<T>], others[kChunkWarps<T>];
  __shared__ uint32_t entry;
  __shared__ Staged<Vector> staged;
  const Place place = place_of(table, blockIdx.x);
  const ResidualArgs& args = table.tensors[place.tensor];
  // W is on its way while the header is read.
  const ChunkSpan span = args.span(place.block);
  const Tile<T, Vector> tile(args.perturb, span, &staged);
  Packed<T> weight[kThreadVectors<T>], noisy[kThreadVectors<T>];
#pragma unroll
  for (int v = 0; v < kThreadVectors<T>; ++v) weight[v] = tile.load(v);
  if (args.header->refused != 0) return;
  static_assert(kStreamRoom % 4 == 0);
#pragma unroll
  for (uint32_t i = threadIdx.x; i < kStreamRoom / 4; i += kChunkThreads<T>) {
    reinterpret_cast<Bits128*>(stream)[i] = {};
  }
  uint32_t grid = 0;
  if constexpr (sizeof(T) == 4 && kPacks) grid = common_zeros(weight, others);

  VectorFields found[kThreadVectors<T>] = {};
  uint32_t check = 0, bits = 0, listed = 0, missing = 0;
#pragma unroll
  for (int v = 0; v < kThreadVectors<T>; ++v) {
    float e[kVector];
    tile.noise(v, e);
    noisy[v] = perturb_packed<T, Elementwise>(weight[v], e);
    check += check_of(noisy[v], tile.first + v * kVector);
    if constexpr (kPacks) {
      found[v] = find_fields<T, Elementwise>(weight[v], noisy[v], e, grid);
      for (int quad = 0; quad < kQuads; ++quad) bits += found[v].bits[quad];
      listed |= found[v].listed << v * kVector;
      missing |= found[v].missing << v * kVector;
    }
  }
  warp_total(check, checks);
  const BlockSum packed = block_sum(pair_of(bits, count_ones(listed)), totals);

  ChunkMode mode = ChunkMode::kRaw;
  uint32_t words = raw_words<T>(tile.count), head = 0, stream_words = 0, before = 0;
  if constexpr (kPacks) {
    const uint32_t needed = ((packed.total & 0xFFFFu) + 31) / 32;
    const uint32_t packed_words = 2 + needed + kEntryWords<T> * (packed.total >> 16);
    if (packed_words < words) {
      mode = ChunkMode::kPacked;
      words = packed_words;
      head = packed.total;
      stream_words = needed;
      before = packed.before >> 16;
    }
    if (sizeof(T) == 4 && grid != 0) {
      const BlockSum gridded = block_sum(count_ones(missing), others);
      const uint32_t grid_words = 2 + kEntryWords<T> * gridded.total;
      if (grid_words < packed_words && grid_words < raw_words<T>(tile.count)) {
        mode = ChunkMode::kGrid;
        words = grid_words;
        head = pair_of(grid, gridded.total);
        stream_words = 0;
        before = gridded.before;
        listed = missing;
      }
    }
  }

  if (threadIdx.x == 0) {
    const uint64_t offset = atomicAdd(reinterpret_cast<unsigned long long*>(&args.header->asked),
                                      static_cast<unsigned long long>(words));
    const bool fits = offset + words <= args.capacity && offset < kMaxPayloadOffset;
    entry = static_cast<uint32_t>(offset) << 2 | static_cast<uint32_t>(mode);
    if (!fits) {
      entry = 0;
      atomicAdd(&args.header->clean, 1u);
    }
    args.directory()[place.block] = entry;
  }
  if (mode == ChunkMode::kPacked) put_fields<T>(stream, packed.before & 0xFFFFu, found, bits);
  __syncthreads();
  // No room: the chunk is not perturbed. No mode that takes room is 0.
  if (entry == 0) return;
  uint32_t* payload = args.pool + (entry >> 2);
  if (mode == ChunkMode::kRaw) {
    if (threadIdx.x == 0) payload[0] = sum_of(checks) * kCheckMultiplier;
    constexpr uint32_t kWords = kVector * sizeof(T) / 4;
#pragma unroll
    for (int v = 0; v < kThreadVectors<T>; ++v) {
      const uint32_t at = 1 + (threadIdx.x * kThreadVectors<T> + v) * kWords;
      const Packed<T> before = tile.load(v);
      for (uint32_t i = 0; i < kWords; ++i) {
        if (at + i < words) payload[at + i] = before.bits[i / 4].w[i % 4];
      }
    }
  } else {
    if (threadIdx.x == 0) {
      payload[0] = head;
      payload[1] = sum_of(checks) * kCheckMultiplier;
    }
    for (uint32_t i = threadIdx.x; i < stream_words; i += kChunkThreads<T>)
      payload[2 + i] = stream[i];
    if (listed != 0) {
      put_list(payload + 2 + stream_words + kEntryWords<T> * before, tile, listed);
    }
  }
  tile.store(noisy);
}

void launch_perturb_residual(const std::vector<ResidualArgs>& tensors, int, cudaStream_t stream) {
  launch_residual_begin(tensors, false, stream);
  launch_chunks(tensors, [&](const auto& table, auto weight, auto elementwise, auto vector) {
    FLATKERN_LAUNCH((perturb_residual_kernel<decltype(weight), decltype(elementwise)::value,
                                             decltype(vector)::value>),
                    static_cast<int>(table.blocks()), kChunkThreads<decltype(weight)>, stream,
                    table);
  });
}

}  // namespace flatkern::cuda

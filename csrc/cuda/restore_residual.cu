// Restore from a residual: a block per chunk of 4096 elements, which stays in registers.
#include "residual.h"

namespace flatkern::cuda {

// What decoding has found of a vector: where each range begins, and how many bits its fields have.
struct VectorBases {
  uint32_t base[kVector], width[kVector], bits;
};

template <class T, bool Elementwise>
FLATKERN_HD VectorBases find_bases(const Packed<T>& noisy, const float* e, uint32_t grid) {
  float s[kVector];
  to_floats(noisy, s);
  VectorBases found;
  found.bits = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const Bracket range = bracket<T, Elementwise>(T{}, s[i], e[i]);
    found.base[i] = range.base;
    found.width[i] = width_of(range.span);
    if constexpr (sizeof(T) == 4) {
      if (grid != 0) {
        found.base[i] = round_to_grid(s[i], e[i], grid);
        found.width[i] = 0;
      }
    }
    found.bits += found.width[i];
  }
  return found;
}

// Bits shift .. shift + 31 of two words.
FLATKERN_HD uint32_t funnel(uint32_t low, uint32_t high, uint32_t shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_rc(low, high, shift);
#else
  return static_cast<uint32_t>((low | static_cast<uint64_t>(high) << 32) >> shift);
#endif
}

// Adds a vector's fields, from bit `at` of the stream on, to their bases.
FLATKERN_HD void add_fields(VectorBases& found, const uint32_t* stream, uint32_t at) {
  const uint32_t *word = stream + at / 32, shift = at % 32;
  const uint32_t low = funnel(word[0], word[1], shift), high = funnel(word[1], word[2], shift);
  uint32_t first_bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) first_bits += found.width[i];
  uint32_t fields = low;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i == 4) fields = funnel(low, high, first_bits);
    found.base[i] += fields & ((1u << found.width[i]) - 1u);
    fields >>= found.width[i];
  }
}

// What a payload says, and whether it can be one of this chunk.
struct Payload {
  const uint32_t *stream, *list;
  uint32_t check, bits, grid, listed, stream_words;
  bool plausible;
};

template <class T, bool Packs>
FLATKERN_HD Payload read_payload(const uint32_t* words, uint64_t room, ChunkMode mode,
                                 uint32_t count) {
  Payload p = {};
  if (mode == ChunkMode::kRaw) {
    p.plausible = raw_words<T>(count) <= room;
    if (p.plausible) p.check = words[0];
    p.stream = words + 1;
    return p;
  }
  if (!Packs || room < 2) return p;
  p.check = words[1];
  p.listed = words[0] >> 16;
  p.plausible = true;
  if (mode == ChunkMode::kPacked) {
    p.bits = words[0] & 0xFFFFu;
    p.stream_words = (p.bits + 31) / 32;
    p.plausible = p.stream_words <= kStreamWords;
  } else {
    p.grid = words[0] & 0xFFFFu;
    p.plausible = sizeof(T) == 4 && p.grid >= kMinGrid && p.grid <= kMaxGrid;
  }
  p.stream = words + 2;
  p.list = p.stream + p.stream_words;
  p.plausible = p.plausible && 2 + p.stream_words + kEntryWords<T> * p.listed <= room;
  return p;
}

// Vector: see Tile.
template <class T, bool Elementwise, bool Vector>
__global__ void __launch_bounds__(kChunkThreads)
    restore_residual_kernel(const __grid_constant__ Table<ResidualArgs> table) {
  constexpr bool kPacks = !(Elementwise && sizeof(T) == 4);
  __shared__ uint32_t stream[kStreamRoom];
  __shared__ uint32_t totals[kChunkWarps], checks[kChunkWarps];
  __shared__ Staged<Vector> staged;
  const Place place = place_of(table, blockIdx.x);
  const ResidualArgs& args = table.tensors[place.tensor];
  if (args.header->refused != 0) return;
  const uint32_t entry = args.directory[place.block], offset = entry >> 2;
  const ChunkMode mode = static_cast<ChunkMode>(entry & 3u);
  if (mode == ChunkMode::kClean) return;
  const auto refuse = [&] {
    if (threadIdx.x != 0) return;
    atomicAdd(&args.header->mismatched, 1u);
    args.header->state = kFilled;
  };
  const ChunkSpan span = args.chunks().span(place.block);
  const Payload payload = read_payload<T, kPacks>(
      args.pool + offset, offset < args.capacity ? args.capacity - offset : 0, mode,
      static_cast<uint32_t>(span.count()));
  if (!payload.plausible) return refuse();

  for (uint32_t i = threadIdx.x; i < payload.stream_words; i += kChunkThreads) {
    stream[i] = payload.stream[i];
  }
  const Tile<T, Vector> tile(args.perturb, span, &staged);
  Packed<T> result[kThreadVectors];
  VectorBases found[kThreadVectors];
  uint32_t check = 0, sum = 0;
#pragma unroll
  for (int v = 0; v < kThreadVectors; ++v) {
    result[v] = tile.load(v);
    check += check_of(result[v], tile.first + v * kVector);
  }
  if (kPacks && mode != ChunkMode::kRaw) {
#pragma unroll
    for (int v = 0; v < kThreadVectors; ++v) {
      float e[kVector];
      tile.noise(v, e);
      found[v] = find_bases<T, Elementwise>(result[v], e, payload.grid);
      sum += found[v].bits;
    }
    // A position outside of the chunk, counted above the bits.
    for (uint32_t i = threadIdx.x; i < payload.listed; i += kChunkThreads) {
      const uint32_t item = payload.list[i * kEntryWords<T>];
      if ((sizeof(T) == 2 ? item >> 16 : item) >= tile.count) sum |= 1u << 16;
    }
  }
  warp_total(check, checks);
  const BlockSum bits = block_sum(sum, totals);
  // The sums are the same in every thread.
  if (bits.total != payload.bits || sum_of(checks) * kCheckMultiplier != payload.check) {
    return refuse();
  }

  if (!kPacks || mode == ChunkMode::kRaw) {
    constexpr uint32_t kWords = kVector * sizeof(T) / 4;
    const uint32_t words = raw_words<T>(tile.count) - 1;
#pragma unroll
    for (int v = 0; v < kThreadVectors; ++v) {
      const uint32_t at = (threadIdx.x * kThreadVectors + v) * kWords;
      for (uint32_t i = 0; i < kWords; ++i) {
        if (at + i < words) result[v].bits[i / 4].w[i % 4] = payload.stream[at + i];
      }
    }
  } else {
    uint32_t at = bits.before & 0xFFFFu;
#pragma unroll
    for (int v = 0; v < kThreadVectors; ++v) {
      add_fields(found[v], stream, at);
      set_codes(result[v], found[v].base);
      at += found[v].bits;
    }
  }
  tile.store(result);
  if (payload.listed != 0) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < payload.listed; i += kChunkThreads) {
      const uint32_t* item = payload.list + i * kEntryWords<T>;
      const uint32_t position = sizeof(T) == 2 ? item[0] >> 16 : item[0];
      *tile.at(position) = value_of_code<T>(sizeof(T) == 2 ? item[0] : item[1]);
    }
  }
  // Restored: a second try, after other chunks were refused, goes on from here.
  if (threadIdx.x == 0) args.directory[place.block] = 0;
}

void launch_restore_residual(const std::vector<ResidualArgs>& tensors, int, cudaStream_t stream) {
  launch_residual_begin(tensors, true, stream);
  launch_chunks(tensors, [&](const auto& table, auto weight, auto elementwise, auto vector) {
    FLATKERN_LAUNCH((restore_residual_kernel<decltype(weight), decltype(elementwise)::value,
                                             decltype(vector)::value>),
                    static_cast<int>(table.blocks()), kChunkThreads, stream, table);
  });
}

}  // namespace flatkern::cuda

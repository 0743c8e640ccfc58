// Restore from a residual: a block per chunk of 4096 elements, which stays in registers.
#include "residual.h"

namespace flatkern::cuda {

// What decoding has found of a vector: where each range begins, and how many bits its fields have.
template <class T>
struct VectorBases {
  uint32_t base[Ranges<T>::kWords];
  Widths<T> widths;

  FLATKERN_HD uint32_t bits() const { return widths.bits(0) + widths.bits(1); }
};

template <class T, bool Elementwise>
FLATKERN_HD VectorBases<T> bases_of(const Packed<T>& noisy, const float* e, uint32_t grid) {
  VectorBases<T> found = {};
  if constexpr (sizeof(T) == 4) {
    if (grid != 0) {
      for (int i = 0; i < kVector; ++i) {
        found.base[i] = round_to_grid(float_of_bits(code_at(noisy, i)), e[i], grid);
      }
      return found;
    }
  }
  const Ranges<T> ranges = ranges_of<T, Elementwise>(noisy, e);
#pragma unroll
  for (int i = 0; i < Ranges<T>::kWords; ++i) found.base[i] = ranges.word[i].base;
  found.widths = widths_of(ranges);
  return found;
}

// The 32 bits of the stream from bit `at` on.
FLATKERN_HD uint32_t word_at(const uint32_t* stream, uint32_t at) {
  return funnel(stream[at / 32], stream[at / 32 + 1], at % 32);
}

// Adds a thread's fields, `bits` of them from bit `at` of the stream on, to their bases: seldom
// more than a word.
template <class T>
FLATKERN_HD void add_fields(VectorBases<T>* found, const uint32_t* stream, uint32_t at,
                            uint32_t bits) {
  uint32_t joined = word_at(stream, at);
#pragma unroll
  for (int i = 0; i < kThreadVectors<T> * kQuads; ++i) {
    VectorBases<T>& vector = found[i / kQuads];
    vector.widths.add(joined, i % kQuads, vector.base);
    const uint32_t width = vector.widths.bits(i % kQuads);
    at += width;
    joined = bits <= 32 ? funnel(joined, 0, width) : word_at(stream, at);
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
__global__ void __launch_bounds__(kChunkThreads<T>)
    restore_residual_kernel(const __grid_constant__ Table<ResidualArgs> table) {
  constexpr bool kPacks = !(Elementwise && sizeof(T) == 4);
  __shared__ uint32_t stream[kStreamRoom];
  __shared__ uint32_t totals[kChunkWarps<T>], checks[kChunkWarps<T>];
  __shared__ Staged<Vector> staged;
  const Place place = place_of(table, blockIdx.x);
  const ResidualArgs& args = table.tensors[place.tensor];
  // S is on its way while the header, the directory and the payload are read, one after the other.
  const ChunkSpan span = args.span(place.block);
  const Tile<T, Vector> tile(args.perturb, span, &staged);
  Packed<T> result[kThreadVectors<T>];
#pragma unroll
  for (int v = 0; v < kThreadVectors<T>; ++v) result[v] = tile.load(v);
  if (args.header->refused != 0) return;
  const uint32_t entry = args.directory()[place.block], offset = entry >> 2;
  const ChunkMode mode = static_cast<ChunkMode>(entry & 3u);
  if (mode == ChunkMode::kClean) return;
  const auto refuse = [&] {
    if (threadIdx.x != 0) return;
    atomicAdd(&args.header->mismatched, 1u);
    args.header->state = kFilled;
  };
  const Payload payload = read_payload<T, kPacks>(
      args.pool + offset, offset < args.capacity ? args.capacity - offset : 0, mode, span.count());
  if (!payload.plausible) return refuse();

  for (uint32_t i = threadIdx.x; i < payload.stream_words; i += kChunkThreads<T>) {
    stream[i] = payload.stream[i];
  }
  VectorBases<T> found[kThreadVectors<T>];
  uint32_t check = 0, own_bits = 0, sum = 0;
#pragma unroll
  for (int v = 0; v < kThreadVectors<T>; ++v) {
    check += check_of(result[v], tile.first + v * kVector);
  }
  if (kPacks && mode != ChunkMode::kRaw) {
#pragma unroll
    for (int v = 0; v < kThreadVectors<T>; ++v) {
      float e[kVector];
      tile.noise(v, e);
      found[v] = bases_of<T, Elementwise>(result[v], e, payload.grid);
      own_bits += found[v].bits();
    }
    sum = own_bits;
    // A position outside of the chunk, counted above the bits.
    for (uint32_t i = threadIdx.x; i < payload.listed; i += kChunkThreads<T>) {
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
    for (int v = 0; v < kThreadVectors<T>; ++v) {
      const uint32_t at = (threadIdx.x * kThreadVectors<T> + v) * kWords;
      for (uint32_t i = 0; i < kWords; ++i) {
        if (at + i < words) result[v].bits[i / 4].w[i % 4] = payload.stream[at + i];
      }
    }
  } else {
    add_fields(found, stream, bits.before & 0xFFFFu, own_bits);
#pragma unroll
    for (int v = 0; v < kThreadVectors<T>; ++v) set_words(result[v], found[v].base);
  }
  tile.store(result);
  if (payload.listed != 0) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < payload.listed; i += kChunkThreads<T>) {
      const uint32_t* item = payload.list + i * kEntryWords<T>;
      const uint32_t position = sizeof(T) == 2 ? item[0] >> 16 : item[0];
      *tile.at(position) = value_of_code<T>(sizeof(T) == 2 ? item[0] : item[1]);
    }
  }
  // Restored: a second try, after other chunks were refused, goes on from here.
  if (threadIdx.x == 0) args.directory()[place.block] = 0;
}

void launch_restore_residual(const std::vector<ResidualArgs>& tensors, int, cudaStream_t stream) {
  launch_residual_begin(tensors, true, stream);
  launch_chunks(tensors, [&](const auto& table, auto weight, auto elementwise, auto vector) {
    FLATKERN_LAUNCH((restore_residual_kernel<decltype(weight), decltype(elementwise)::value,
                                             decltype(vector)::value>),
                    static_cast<int>(table.blocks()), kChunkThreads<decltype(weight)>, stream,
                    table);
  });
}

}  // namespace flatkern::cuda

// Perturb that fills a residual: a block per chunk of 4096 elements, which stays in registers.
#include "residual.h"

namespace flatkern::cuda {

// What a thread has found in a vector.
struct VectorFields {
  uint64_t fields;  // end to end, low bit first
  uint32_t bits, listed, missing;
};

template <class T, bool Elementwise>
FLATKERN_HD VectorFields find_fields(const Packed<T>& weight, const Packed<T>& noisy,
                                     const float* e, uint32_t grid) {
  float s[kVector];
  to_floats(noisy, s);
  uint32_t fields[2] = {}, bits[2] = {}, listed = 0, missing = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t code = code_at(weight, i);
    const Bracket range = bracket<T, Elementwise>(T{}, s[i], e[i]);
    const uint32_t index = code - range.base;
    const bool outside = index > range.span;
    if (outside) listed |= 1u << i;
    if constexpr (sizeof(T) == 4) {
      if (grid != 0 && round_to_grid(s[i], e[i], grid) != code) missing |= 1u << i;
    }
    // Four fields are at most 32 bits.
    fields[i / 4] |= (outside ? 0u : index) << (bits[i / 4] & 31u);
    bits[i / 4] += width_of(range.span);
  }
  return {fields[0] | static_cast<uint64_t>(fields[1]) << bits[0], bits[0] + bits[1], listed,
          missing};
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
  for (int v = 0; v < kThreadVectors; ++v) {
    for (int i = 0; i < kVector; ++i) all |= code_at(weight[v], i);
  }
  all = __reduce_or_sync(kWholeWarp, all);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = all;
  __syncthreads();
  all = 1u << kMaxGrid;
  for (int w = 0; w < kChunkWarps; ++w) all |= of_warps[w];
  // The lowest bit that is set: its number is the bits of what lies below.
  const uint32_t zeros = width_of((all & (0u - all)) - 1u);
  return zeros < kMinGrid ? 0 : zeros;
}

// A thread's fields of a vector, from bit `at` of the stream on.
__device__ __forceinline__ void put_fields(uint32_t* stream, uint32_t at, uint64_t fields) {
  if (fields == 0) return;
  const uint32_t shift = at % 32;
  uint32_t* word = stream + at / 32;
  const uint64_t low = fields << shift;
  const uint32_t last = static_cast<uint32_t>(fields >> 32 >> 1 >> (31 - shift));
  atomicOr(word, static_cast<uint32_t>(low));
  if (low >> 32 != 0) atomicOr(word + 1, static_cast<uint32_t>(low >> 32));
  if (last != 0) atomicOr(word + 2, last);
}

template <class T>
__device__ __forceinline__ void put_list(uint32_t* to, const Packed<T>& weight, uint32_t first,
                                         uint32_t listed) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if ((listed >> i & 1u) == 0) continue;
    if constexpr (sizeof(T) == 2) {
      *to++ = (first + i) << 16 | code_at(weight, i);
    } else {
      *to++ = first + i;
      *to++ = code_at(weight, i);
    }
  }
}

// Vector: see Tile.
template <class T, bool Elementwise, bool Vector>
__global__ void __launch_bounds__(kChunkThreads)
    perturb_residual_kernel(const __grid_constant__ Table<ResidualArgs> table) {
  // float32 has no bits to spare for elementwise noise: raw.
  constexpr bool kPacks = !(Elementwise && sizeof(T) == 4);
  alignas(16) __shared__ uint32_t stream[kStreamRoom];
  __shared__ uint32_t totals[kChunkWarps], checks[kChunkWarps], others[kChunkWarps];
  __shared__ uint32_t entry;
  __shared__ Staged<Vector> staged;
  const Place place = place_of(table, blockIdx.x);
  const ResidualArgs& args = table.tensors[place.tensor];
  if (args.header->refused != 0) return;
  static_assert(kStreamRoom == 4 * (kChunkThreads + 1));
  reinterpret_cast<Bits128*>(stream)[threadIdx.x] = {};
  if (threadIdx.x == 0) reinterpret_cast<Bits128*>(stream)[kChunkThreads] = {};

  const ChunkSpan span = args.chunks().span(place.block);
  const Tile<T, Vector> tile(args.perturb, span, &staged);
  Packed<T> weight[kThreadVectors], noisy[kThreadVectors];
#pragma unroll
  for (int v = 0; v < kThreadVectors; ++v) weight[v] = tile.load(v);
  uint32_t grid = 0;
  if constexpr (sizeof(T) == 4 && kPacks) grid = common_zeros(weight, others);

  VectorFields found[kThreadVectors] = {};
  uint32_t check = 0, sum = 0, missing = 0;
#pragma unroll
  for (int v = 0; v < kThreadVectors; ++v) {
    float e[kVector];
    tile.noise(v, e);
    noisy[v] = perturb_packed<T, Elementwise>(weight[v], e);
    check += check_of(noisy[v], tile.first + v * kVector);
    if constexpr (kPacks) {
      found[v] = find_fields<T, Elementwise>(weight[v], noisy[v], e, grid);
      sum += pair_of(found[v].bits, count_ones(found[v].listed));
      missing += count_ones(found[v].missing);
    }
  }
  warp_total(check, checks);
  const BlockSum packed = block_sum(sum, totals);

  ChunkMode mode = ChunkMode::kRaw;
  uint32_t words = raw_words<T>(tile.count), head = 0, stream_words = 0, before = 0;
  if constexpr (kPacks) {
    const uint32_t bits = packed.total & 0xFFFFu, needed = (bits + 31) / 32;
    const uint32_t packed_words = 2 + needed + kEntryWords<T> * (packed.total >> 16);
    if (packed_words < words) {
      mode = ChunkMode::kPacked;
      words = packed_words;
      head = packed.total;
      stream_words = needed;
      before = packed.before >> 16;
    }
    if (sizeof(T) == 4 && grid != 0) {
      const BlockSum gridded = block_sum(missing, others);
      const uint32_t grid_words = 2 + kEntryWords<T> * gridded.total;
      if (grid_words < packed_words && grid_words < raw_words<T>(tile.count)) {
        mode = ChunkMode::kGrid;
        words = grid_words;
        head = pair_of(grid, gridded.total);
        stream_words = 0;
        before = gridded.before;
#pragma unroll
        for (int v = 0; v < kThreadVectors; ++v) found[v].listed = found[v].missing;
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
    args.directory[place.block] = entry;
  }
  if (mode == ChunkMode::kPacked) {
    uint32_t at = packed.before & 0xFFFFu;
#pragma unroll
    for (int v = 0; v < kThreadVectors; ++v) {
      put_fields(stream, at, found[v].fields);
      at += found[v].bits;
    }
  }
  __syncthreads();
  // No room: the chunk is not perturbed. No mode that takes room is 0.
  if (entry == 0) return;
  uint32_t* payload = args.pool + (entry >> 2);
  if (mode == ChunkMode::kRaw) {
    if (threadIdx.x == 0) payload[0] = sum_of(checks) * kCheckMultiplier;
    constexpr uint32_t kWords = kVector * sizeof(T) / 4;
#pragma unroll
    for (int v = 0; v < kThreadVectors; ++v) {
      const uint32_t at = 1 + (threadIdx.x * kThreadVectors + v) * kWords;
      for (uint32_t i = 0; i < kWords; ++i) {
        if (at + i < words) payload[at + i] = weight[v].bits[i / 4].w[i % 4];
      }
    }
  } else {
    if (threadIdx.x == 0) {
      payload[0] = head;
      payload[1] = sum_of(checks) * kCheckMultiplier;
    }
    for (uint32_t i = threadIdx.x; i < stream_words; i += kChunkThreads) payload[2 + i] = stream[i];
    uint32_t* list = payload + 2 + stream_words + kEntryWords<T> * before;
#pragma unroll
    for (int v = 0; v < kThreadVectors; ++v) {
      if (found[v].listed == 0) continue;
      put_list(list, weight[v], tile.first + v * kVector, found[v].listed);
      list += kEntryWords<T> * count_ones(found[v].listed);
    }
  }
  tile.store(noisy);
}

void launch_perturb_residual(const std::vector<ResidualArgs>& tensors, int, cudaStream_t stream) {
  launch_residual_begin(tensors, false, stream);
  launch_chunks(tensors, [&](const auto& table, auto weight, auto elementwise, auto vector) {
    FLATKERN_LAUNCH((perturb_residual_kernel<decltype(weight), decltype(elementwise)::value,
                                             decltype(vector)::value>),
                    static_cast<int>(table.blocks()), kChunkThreads, stream, table);
  });
}

}  // namespace flatkern::cuda

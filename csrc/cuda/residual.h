// What the residual's two kernels share: a chunk's elements in a block's registers, and sums over
// the block.
#pragma once

#include <tuple>
#include <type_traits>

#include "fields.h"
#include "perturb.h"

namespace flatkern::cuda {

// A block has a chunk, a thread the chunk's next kThreadElements. More of them share what a thread
// does once; of float32 more would take too many registers.
template <class T>
constexpr int kThreadVectors = sizeof(T) == 4 ? 2 : 4;
template <class T>
constexpr int kThreadElements = kThreadVectors<T> * kVector;
template <class T>
constexpr int kChunkThreads = static_cast<int>(kChunk) / kThreadElements<T>;
template <class T>
constexpr int kChunkWarps = kChunkThreads<T> / kWarp;
// A full stream: eight bits an element. A thread's fields may be read two words beyond.
constexpr uint32_t kStreamWords = static_cast<uint32_t>(kChunk) * 8 / 32;
constexpr uint32_t kStreamRoom = kStreamWords + 4;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Sums over the block; one barrier, behind which `totals` must stay as it is.
struct BlockSum {
  uint32_t before, total;  // of the threads before this one; of all
};

// `sum` and that of the lane so far below, where there is one.
__device__ __forceinline__ uint32_t plus_below(uint32_t sum, int distance) {
#ifdef __CUDA_ARCH__
  // The shuffle itself says whether there is one.
  asm("{ .reg .pred inside; .reg .b32 below;\n\t"
      "shfl.sync.up.b32 below|inside, %0, %1, 0, -1;\n\t"
      "@inside add.u32 %0, %0, below; }"
      : "+r"(sum)
      : "r"(distance));
  return sum;
#else
  const uint32_t below = __shfl_up_sync(kWholeWarp, sum, distance);
  return static_cast<int>(threadIdx.x % kWarp) >= distance ? sum + below : sum;
#endif
}

template <int Warps>
__device__ __forceinline__ BlockSum block_sum(uint32_t value, uint32_t (&totals)[Warps]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) sum = plus_below(sum, distance);
  if (lane == kWarp - 1) totals[warp] = sum;
  __syncthreads();
  const uint32_t total = lane < Warps ? totals[lane] : 0;
  const uint32_t of_warps = __reduce_add_sync(kWholeWarp, lane < warp ? total : 0);
  return {of_warps + sum - value, __reduce_add_sync(kWholeWarp, total)};
}

// The sum of a warp's values in `totals`, for others to read behind a barrier.
__device__ __forceinline__ void warp_total(uint32_t value, uint32_t* totals) {
  const uint32_t sum = __reduce_add_sync(kWholeWarp, value);
  if (threadIdx.x % kWarp == 0) totals[threadIdx.x / kWarp] = sum;
}
template <int Warps>
__device__ __forceinline__ uint32_t sum_of(const uint32_t (&totals)[Warps]) {
  uint32_t sum = 0;
#pragma unroll
  for (int w = 0; w < Warps; ++w) sum += totals[w];
  return sum;
}

// Bit patterns of packed elements, by index.
template <class T>
FLATKERN_HD uint32_t code_at(const Packed<T>& packed, int i) {
  if constexpr (sizeof(T) == 4) return packed.bits[i / 4].w[i % 4];
  const uint32_t pair = packed.bits[0].w[i / 2];
  return i % 2 ? pair >> 16 : pair & 0xFFFFu;
}
template <class T>
FLATKERN_HD void set_codes(Packed<T>& packed, const uint32_t* codes) {
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < kVector; ++i) packed.bits[i / 4].w[i % 4] = codes[i];
  } else {
    for (int i = 0; i < kVector; i += 2) packed.bits[0].w[i / 2] = pair_of(codes[i], codes[i + 1]);
  }
}
// Of the words that the elements lie in.
template <class T>
FLATKERN_HD void set_words(Packed<T>& packed, const uint32_t* words) {
  for (int i = 0; i < Ranges<T>::kWords; ++i) packed.bits[i / 4].w[i % 4] = words[i];
}
template <class T>
FLATKERN_HD T value_of_code(uint32_t code) {
  if constexpr (sizeof(T) == 4) {
    return float_of_bits(code);
  } else {
    return {static_cast<uint16_t>(code)};
  }
}
FLATKERN_HD uint32_t code_of(float value) { return bits_of_float(value); }
template <class T>
FLATKERN_HD uint32_t code_of(T value) {
  return value.bits;
}

// S of packed W: the bits of perturb.
template <class T, bool Elementwise>
FLATKERN_HD Packed<T> perturb_packed(const Packed<T>& weight, const float* e) {
  float value[kVector];
  if constexpr (Elementwise) {
    float w[kVector];
    to_floats(weight, w);
    for (int i = 0; i < kVector; ++i) value[i] = Perturb::apply(w[i], e[i], true);
  } else {
    add_to(weight, e, value);
  }
  Packed<T> noisy = round_packed<T>(value);
  if (!all_finite(noisy)) {
    uint32_t codes[kVector];
    for (int i = 0; i < kVector; ++i) {
      codes[i] = code_of(keep_finite<T>(value_of_code<T>(code_at(weight, i)), value[i]));
    }
    set_codes(noisy, codes);
  }
  return noisy;
}

// sum + low half * first + high half * second, for weights below 256: one instruction.
FLATKERN_HD uint32_t dot_of_pair(uint32_t pair, uint32_t first, uint32_t second, uint32_t sum) {
#ifdef __CUDA_ARCH__
  return __dp2a_lo(pair, first | second << 8, sum);
#else
  return sum + (pair & 0xFFFFu) * first + (pair >> 16) * second;
#endif
}

// The sum of code (2 i + 1) over a vector whose first element is `first` of its chunk.
template <class T>
FLATKERN_HD uint32_t check_of(const Packed<T>& packed, uint32_t first) {
  uint32_t sum = 0, odd = 0;
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < kVector; ++i) {
      sum += code_at(packed, i);
      odd += code_at(packed, i) * (2 * i + 1);
    }
  } else {
    for (int i = 0; i < kVector; i += 2) {
      const uint32_t pair = packed.bits[0].w[i / 2];
      sum = dot_of_pair(pair, 1, 1, sum);
      odd = dot_of_pair(pair, 2 * i + 1, 2 * i + 3, odd);
    }
  }
  return sum * (2 * first) + odd;
}

// A chunk in shared memory, where its rows cannot be read as vectors.
template <bool Vector>
struct Staged {
  uint32_t codes[kChunk];
  float e[kChunk];
};
template <>
struct Staged<true> {};

// The elements of the calling thread; zeros, with no noise, past the chunk's end. Vector: rows are
// 16-byte aligned, start on a group of columns and are whole threads long.
template <class T, bool Vector>
struct Tile {
  const PerturbArgs& args;
  const ChunkSpan& span;
  const uint32_t count, first;
  T* const base;
  Staged<Vector>* const staged;
  PhiloxRow row;
  RowScale c;
  uint32_t group;
  T* here;  // null past the chunk's end

  __device__ __forceinline__ Tile(const PerturbArgs& args, const ChunkSpan& span,
                                  Staged<Vector>* staged)
      : args(args),
        span(span),
        count(span.count()),
        first(threadIdx.x * kThreadElements<T>),
        base(static_cast<T*>(args.out) + span.row * args.out_stride + span.begin),
        staged(staged) {
    if constexpr (Vector) {
      const bool inside = first < count;
      const uint32_t i = span.rows == 1 ? 0 : first / span.cols, j = first - i * span.cols;
      here = inside ? base + i * args.out_stride + j : nullptr;
      const int64_t row_index = span.row + i;
      row = philox_row(load_key(args.block.key),
                       static_cast<uint32_t>(args.block.row_offset + row_index));
      c = row_scale_of(inside ? args.row_scale[row_index] : 0.0f);
      group = static_cast<uint32_t>((args.block.col_offset + span.begin + j) / 4);
    } else {
      for (uint32_t k = threadIdx.x; k < kChunk; k += kChunkThreads<T>) {
        staged->codes[k] = k < count ? code_of(*at(k)) : 0;
        staged->e[k] = 0.0f;
      }
      __syncthreads();
      stage_noise();
      __syncthreads();
    }
  }

  // An element of the chunk.
  __device__ __forceinline__ T* at(uint32_t k) const {
    if (span.rows == 1) return base + k;
    const uint32_t i = k / span.cols;
    return base + i * args.out_stride + (k - i * span.cols);
  }

  __device__ __forceinline__ void stage_noise() const {
    const uint64_t begin = args.block.col_offset + span.begin;
    const uint32_t misfit = static_cast<uint32_t>(begin % 4);
    const uint32_t cols = span.cols, groups = (misfit + cols + 3) / 4;
    for (uint32_t g = threadIdx.x; g < groups * span.rows; g += kChunkThreads<T>) {
      const uint32_t i = g / groups;
      const PhiloxRow of = philox_row(load_key(args.block.key),
                                      static_cast<uint32_t>(args.block.row_offset + span.row + i));
      const RowScale scale = row_scale_of(args.row_scale[span.row + i]);
      float e[4];
      scaled_group(of, static_cast<uint32_t>(begin / 4) + g % groups, scale.scale, e);
      // Below 0, wrapped around, before the row's first column.
      const uint32_t j = g % groups * 4 - misfit;
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        if (j + lane < cols) staged->e[i * cols + j + lane] = e[lane] * scale.after;
      }
    }
  }

  __device__ __forceinline__ Packed<T> load(int v) const {
    Packed<T> packed = {};
    if constexpr (Vector) {
      if (here != nullptr) packed = load_packed(here + v * kVector);
    } else {
      set_codes(packed, staged->codes + first + v * kVector);
    }
    return packed;
  }

  __device__ __forceinline__ void noise(int v, float* e) const {
    if constexpr (Vector) {
      scaled_group(row, group + 2 * v, c.scale, e);
      scaled_group(row, group + 2 * v + 1, c.scale, e + 4);
      // A loop, because what is done under a condition may be computed everywhere.
#pragma unroll 1
      for (bool shifts = c.after != 1.0f; shifts; shifts = false) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) e[i] *= c.after;
      }
    } else {
      for (int i = 0; i < kVector; ++i) e[i] = staged->e[first + v * kVector + i];
    }
  }

  // All threads of the block together.
  __device__ __forceinline__ void store(const Packed<T>* packed) const {
    if constexpr (Vector) {
      if (here == nullptr) return;
#pragma unroll
      for (int v = 0; v < kThreadVectors<T>; ++v) store_packed(here + v * kVector, packed[v]);
    } else {
#pragma unroll
      for (int v = 0; v < kThreadVectors<T>; ++v) {
        for (int i = 0; i < kVector; ++i) {
          staged->codes[first + v * kVector + i] = code_at(packed[v], i);
        }
      }
      __syncthreads();
      for (uint32_t k = threadIdx.x; k < count; k += kChunkThreads<T>) {
        *at(k) = value_of_code<T>(staged->codes[k]);
      }
    }
  }
};

// Decides, ahead of the chunks' kernels, which tensors they may write.
void launch_residual_begin(const std::vector<ResidualArgs>& tensors, bool restore,
                           cudaStream_t stream);

// How the kernels read a weight's rows.
inline bool takes_vectors(const PerturbArgs& args) {
  const bool wide = args.out_dtype == Dtype::kFloat32;
  return is_vector_aligned(args.out, args.out_stride, args.out_dtype) &&
         args.block.col_offset % 4 == 0 &&
         args.block.cols % (wide ? kThreadElements<float> : kThreadElements<BFloat16>) == 0;
}

template <class F>
void with_flag(bool flag, const F& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// The chunks of `tensors`: launch(table, weight type, elementwise, vector) for every kernel that
// they take, a block a chunk.
template <class Launch>
void launch_chunks(const std::vector<ResidualArgs>& tensors, const Launch& launch) {
  const auto kernel = [](const ResidualArgs& args) {
    const PerturbArgs& perturb = args.perturb;
    return std::tuple(perturb.weight_dtype, perturb.elementwise, takes_vectors(perturb));
  };
  const auto chunks = [](const ResidualArgs& args) {
    return static_cast<uint32_t>(args.chunks().count());
  };
  for (const Table<ResidualArgs>& table : tables_of(tensors, kernel, chunks)) {
    const PerturbArgs& first = table.tensors[0].perturb;
    with_type(first.weight_dtype, [&](auto weight) {
      with_flag(first.elementwise, [&](auto elementwise) {
        with_flag(takes_vectors(first),
                  [&](auto vector) { launch(table, weight, elementwise, vector); });
      });
    });
  }
}

}  // namespace flatkern::cuda

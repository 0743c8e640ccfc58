// Perturb that fills a residual, and restore from it, a chunk at a time. Compiled once per
// instruction set.

namespace flatkern::cpu::FLATKERN_ISA {

// What an element leaves to the serial writer, in 16 bits: its field, the field's width, and
// whether it is listed, or would be under mode GRID. Mostly 0.
constexpr uint32_t kFieldMask = 0xFF, kWidthMask = 0xF, kMissesGrid = 0x4000, kListed = 0x8000;
constexpr int kWidthShift = 8;

// One chunk, in cache; zeros up to a whole vector.
template <class T>
struct Scratch {
  alignas(64) T weight[kChunk];
  alignas(64) T noisy[kChunk];
  alignas(64) float e[kChunk];
  alignas(64) uint16_t fields[kChunk];
  uint64_t nonzero[kChunk / 64];  // a bit for each field
};

// Fields of kLanes elements from element k on; lanes go in order.
template <class T>
FLATKERN_INLINE void store_fields(Scratch<T>& x, int64_t k, VUint field) {
  store_vector(x.fields + k, __builtin_convertvector(field, VHalf));
  const uint64_t bits = lane_bits(field != 0u);
  uint64_t& word = x.nonzero[k / 64];
  word = k % 64 == 0 ? bits : word | bits << k % 64;
}

template <class T>
FLATKERN_INLINE uint32_t code_at(const T* p) {
  if constexpr (sizeof(T) == 2) return p->bits;
  uint32_t code;
  memcpy(&code, p, sizeof code);
  return code;
}
template <class T>
FLATKERN_INLINE void set_code(T* p, uint32_t code) {
  memcpy(p, &code, sizeof(T));
}

template <class T>
void clear_padding(T* values, int64_t count) {
  const int64_t padding = (kLanes - count % kLanes) % kLanes;
  memset(static_cast<void*>(values + count), 0, padding * sizeof(T));
}

template <class T>
void gather(const PerturbArgs& args, const ChunkSpan& span, T* to) {
  const T* from = static_cast<const T*>(args.weight) + span.row * args.weight_stride + span.begin;
  for (int64_t i = 0; i < span.rows; ++i) {
    memcpy(to + i * span.cols, from + i * args.weight_stride, span.cols * sizeof(T));
  }
  clear_padding(to, span.count());
}

template <class T>
void scatter(const PerturbArgs& args, const ChunkSpan& span, const T* from) {
  T* to = static_cast<T*>(args.out) + span.row * args.out_stride + span.begin;
  for (int64_t i = 0; i < span.rows; ++i) {
    memcpy(to + i * args.out_stride, from + i * span.cols, span.cols * sizeof(T));
  }
}

// c z of a chunk.
void scaled_noise(const PerturbArgs& args, const ChunkSpan& span, float* e) {
  for (int64_t i = 0; i < span.rows; ++i) {
    const int64_t row = span.row + i;
    const float c = usable_scale(args.row_scale[row]);
    const VFloat scale = splat(c);
    float* out = e + i * span.cols;
    for_each_step<Order::kSplit>(
        args.block, row, span.begin, span.begin + span.cols,
        [&](int64_t j, const Normals& z) {
          store(out + (j - span.begin), scale * interleave_low(z.even, z.odd));
          store(out + (j - span.begin) + kLanes, scale * interleave_high(z.even, z.odd));
        },
        [&](int64_t j, int count, const float* values) {
          for (int k = 0; k < count; ++k) out[j - span.begin + k] = c * values[k];
        });
  }
  clear_padding(e, span.count());
}

// The same bits as perturb_columns.
template <class T>
FLATKERN_INLINE void perturb_chunk(Scratch<T>& x, int64_t count, bool elementwise) {
  const VFloat limit = splat(overflow_of(x.noisy));
  for (int64_t k = 0; k < count; k += kLanes) {
    const VFloat w = load(x.weight + k), e = load(x.e + k);
    const VFloat s = w + (elementwise ? e * absolute(w) : e);
    if (__builtin_expect(any(~(absolute(s) < limit)), 0)) {
      one_by_one<Perturb>(x.weight + k, x.noisy + k, kLanes, 1.0f, x.e + k, elementwise);
    } else {
      store(x.noisy + k, s);
    }
  }
}

template <class T>
uint32_t check_of(const T* noisy, int64_t count) {
  VUint sum{}, odd;
  for (int i = 0; i < kLanes; ++i) odd[i] = 2 * i + 1;
  for (int64_t k = 0; k < count; k += kLanes) {
    sum += load_codes(noisy + k) * odd;
    odd += 2 * kLanes;
  }
  return sum_lanes(sum) * kCheckMultiplier;
}

// Low bits that are zero in every code, at most kMaxGrid; 0 where GRID cannot be.
template <class T>
int common_zeros(const T* weight, int64_t count) {
  if constexpr (sizeof(T) == 2) return 0;
  VUint all{};
  for (int64_t k = 0; k < count; k += kLanes) all |= load_codes(weight + k);
  const int zeros = __builtin_ctz(or_lanes(all) | 1u << kMaxGrid);
  return zeros < kMinGrid ? 0 : zeros;
}

struct Tally {
  uint32_t bits, listed, missing_grid;
};

template <class T>
FLATKERN_INLINE Tally find_fields(Scratch<T>& x, int64_t count, bool elementwise, int grid) {
  VUint bits{}, listed{}, missing{};
  for (int64_t k = 0; k < count; k += kLanes) {
    const VUint code = load_codes(x.weight + k);
    const VFloat s = load(x.noisy + k), e = load(x.e + k);
    const Bracket range = bracket(s, e, elementwise, x.noisy);
    const VUint width = width_of(range.span), index = code - range.base;
    const VUint outside = (VUint)(index > range.span);
    bits += width;
    listed -= outside;  // true is -1
    VUint field = (index & ~outside) | (width << kWidthShift) | (outside & kListed);
    if constexpr (sizeof(T) == 4) {
      if (grid != 0) {
        const VUint misses = (VUint)(round_to_grid(s, e, grid) != code);
        missing -= misses;
        field |= misses & kMissesGrid;
      }
    }
    store_fields(x, k, field);
  }
  return {sum_lanes(bits), sum_lanes(listed), sum_lanes(missing)};
}

// Calls f(i, field) for the nonzero fields, in order.
template <class T, class F>
FLATKERN_INLINE void for_each_field(const Scratch<T>& x, int64_t count, const F& f) {
  for (int64_t k = 0; k < count; k += 64) {
    for (uint64_t left = x.nonzero[k / 64]; left != 0; left &= left - 1) {
      const int64_t i = k + __builtin_ctzll(left);
      f(i, x.fields[i]);
    }
  }
}

// The stream, fields end to end and low bit first, and the list behind it.
template <class T>
void write_fields(const Scratch<T>& x, int64_t count, bool stream, uint32_t listed_flag,
                  uint32_t* out, uint32_t* list) {
  uint64_t bits = 0;
  uint32_t filled = 0;
  for_each_field(x, count, [&](int64_t i, uint32_t field) {
    if (stream) {
      bits |= static_cast<uint64_t>(field & kFieldMask) << filled;
      filled += field >> kWidthShift & kWidthMask;
      if (filled >= 32) {
        *out++ = static_cast<uint32_t>(bits);
        bits >>= 32;
        filled -= 32;
      }
    }
    if (__builtin_expect(field & listed_flag, 0)) {
      const uint32_t position = static_cast<uint32_t>(i), code = code_at(x.weight + i);
      if constexpr (sizeof(T) == 2) {
        *list++ = position << 16 | code;
      } else {
        *list++ = position;
        *list++ = code;
      }
    }
  });
  if (filled != 0) *out = static_cast<uint32_t>(bits);
}

template <class T, bool kElementwise>
void encode_chunk(const ResidualArgs& args, int64_t chunk) {
  const ChunkSpan span = args.chunks.span(static_cast<uint32_t>(chunk));
  const int64_t count = span.count();
  Scratch<T> x;
  gather(args.perturb, span, x.weight);
  scaled_noise(args.perturb, span, x.e);
  perturb_chunk(x, count, kElementwise);

  ChunkMode mode = ChunkMode::kRaw;
  uint64_t words = raw_words<T>(count), stream_words = 0;
  uint32_t low_half = 0, listed = 0;
  // float32 has no bits to spare for elementwise noise: raw.
  if constexpr (!(kElementwise && sizeof(T) == 4)) {
    const int grid = common_zeros(x.weight, count);
    const Tally tally = find_fields(x, count, kElementwise, grid);
    const uint64_t stream = (tally.bits + 31) / 32;
    const uint64_t packed = 2 + stream + kEntryWords<T> * tally.listed;
    const uint64_t gridded = 2 + kEntryWords<T> * tally.missing_grid;
    if (grid != 0 && gridded < packed && gridded < words) {
      mode = ChunkMode::kGrid;
      words = gridded;
      low_half = grid;
      listed = tally.missing_grid;
    } else if (packed < words) {
      mode = ChunkMode::kPacked;
      words = packed;
      stream_words = stream;
      low_half = tally.bits;
      listed = tally.listed;
    }
  }

  const uint64_t offset = args.asked->fetch_add(words, std::memory_order_relaxed);
  if (offset + words > args.capacity || offset >= kMaxPayloadOffset) {
    args.left_out->fetch_add(1, std::memory_order_relaxed);
    args.directory[chunk] = 0;
    return;
  }
  args.directory[chunk] = static_cast<uint32_t>(offset << 2) | static_cast<uint32_t>(mode);
  uint32_t* payload = args.pool + offset;
  const uint32_t check = check_of(x.noisy, count);
  if (mode == ChunkMode::kRaw) {
    payload[words - 1] = 0;  // half a word may be left over
    payload[0] = check;
    memcpy(payload + 1, x.weight, count * sizeof(T));
  } else {
    const bool packed = mode == ChunkMode::kPacked;
    payload[0] = low_half | listed << 16;
    payload[1] = check;
    write_fields(x, count, packed, packed ? kListed : kMissesGrid, payload + 2,
                 payload + 2 + stream_words);
  }
  scatter(args.perturb, span, x.noisy);
}

// Adds the fields of the stream to the bases.
template <class T>
void read_fields(Scratch<T>& x, int64_t count, const uint32_t* stream) {
  uint64_t bits = 0;
  uint32_t filled = 0;
  for_each_field(x, count, [&](int64_t i, uint32_t width) {
    if (filled < width) {
      bits |= static_cast<uint64_t>(*stream++) << filled;
      filled += 32;
    }
    const uint32_t field = static_cast<uint32_t>(bits) & ((1u << width) - 1);
    set_code(x.weight + i, code_at(x.weight + i) + field);
    bits >>= width;
    filled -= width;
  });
}

// False where a position lies outside the chunk: not what was written.
template <class T>
bool read_list(Scratch<T>& x, int64_t count, const uint32_t* list, uint32_t listed) {
  for (; listed != 0; --listed, list += kEntryWords<T>) {
    const uint32_t position = sizeof(T) == 2 ? list[0] >> 16 : list[0];
    if (position >= count) return false;
    set_code(x.weight + position, sizeof(T) == 2 ? list[0] : list[1]);
  }
  return true;
}

// x.weight from x.noisy and `room` words of payload; false where they do not belong together.
template <class T, bool kElementwise>
bool decode(const PerturbArgs& args, const ChunkSpan& span, ChunkMode mode, const uint32_t* payload,
            uint64_t room, Scratch<T>& x) {
  const int64_t count = span.count();
  if (mode == ChunkMode::kRaw) {
    if (raw_words<T>(count) > room || payload[0] != check_of(x.noisy, count)) return false;
    memcpy(static_cast<void*>(x.weight), payload + 1, count * sizeof(T));
    return true;
  }
  if (room < 2 || payload[1] != check_of(x.noisy, count)) return false;
  const uint32_t low_half = payload[0] & 0xFFFFu, listed = payload[0] >> 16;
  if (kElementwise && sizeof(T) == 4) return false;
  scaled_noise(args, span, x.e);
  uint64_t stream_words = 0;
  if (mode == ChunkMode::kGrid) {
    if (sizeof(T) == 2 || low_half < kMinGrid || low_half > kMaxGrid) return false;
    for (int64_t k = 0; k < count; k += kLanes) {
      store_codes(x.weight + k, round_to_grid(load(x.noisy + k), load(x.e + k), low_half));
    }
  } else {
    VUint bits{};
    for (int64_t k = 0; k < count; k += kLanes) {
      const Bracket range = bracket(load(x.noisy + k), load(x.e + k), kElementwise, x.noisy);
      const VUint width = width_of(range.span);
      bits += width;
      store_codes(x.weight + k, range.base);
      store_fields(x, k, width);
    }
    const uint32_t total = sum_lanes(bits);
    stream_words = (total + 31) / 32;
    if (total != low_half || 2 + stream_words > room) return false;
    read_fields(x, count, payload + 2);
  }
  if (2 + stream_words + kEntryWords<T> * listed > room) return false;
  return read_list(x, count, payload + 2 + stream_words, listed);
}

template <class T, bool kElementwise>
void decode_chunk(const ResidualArgs& args, int64_t chunk) {
  const uint32_t entry = args.directory[chunk];
  const ChunkMode mode = static_cast<ChunkMode>(entry & 3);
  const uint64_t offset = entry >> 2;
  if (mode == ChunkMode::kClean) return;
  const ChunkSpan span = args.chunks.span(static_cast<uint32_t>(chunk));
  Scratch<T> x;
  gather(args.perturb, span, x.noisy);
  const bool inside = offset < args.capacity;
  if (!inside || !decode<T, kElementwise>(args.perturb, span, mode, args.pool + offset,
                                          args.capacity - offset, x)) {
    args.left_out->fetch_add(1, std::memory_order_relaxed);
    return;
  }
  scatter(args.perturb, span, x.weight);
  // Restored: a second try, after other chunks were refused, goes on from here.
  args.directory[chunk] = 0;
}

using ChunkFunction = void (*)(const ResidualArgs&, int64_t chunk);

template <class T>
ChunkFunction chunk_function(bool restore, bool elementwise) {
  if (restore) return elementwise ? decode_chunk<T, true> : decode_chunk<T, false>;
  return elementwise ? encode_chunk<T, true> : encode_chunk<T, false>;
}

void run_chunks(const ResidualArgs& args, bool restore, int64_t begin, int64_t end) {
  const KeepDenormals keep;
  const bool elementwise = args.perturb.elementwise;
  const auto function = [&]() -> ChunkFunction {
    switch (args.perturb.weight_dtype) {
      case Dtype::kFloat32:
        return chunk_function<float>(restore, elementwise);
      case Dtype::kBFloat16:
        return chunk_function<BFloat16>(restore, elementwise);
      default:
        return chunk_function<Float16>(restore, elementwise);
    }
  }();
  for (int64_t chunk = begin; chunk < end; ++chunk) function(args, chunk);
}

void perturb_residual(const ResidualArgs& args, int64_t begin, int64_t end) {
  run_chunks(args, false, begin, end);
}

void restore_residual(const ResidualArgs& args, int64_t begin, int64_t end) {
  run_chunks(args, true, begin, end);
}

}  // namespace flatkern::cpu::FLATKERN_ISA

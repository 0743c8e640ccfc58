// Philox words and normals, a vector step at a time. Compiled once per instruction set.

namespace flatkern::cpu::FLATKERN_ISA {

// Work on the normals of several steps goes stage by stage: a stage's chain of dependent operations
// is short enough for a processor to overlap several of them, a whole step's is not.
constexpr int kBatch = 32;

// A pair of normals a lane.
struct Batch {
  VUint first[kBatch], second[kBatch];  // words
  VFloat radius[kBatch];
};

// Groups of a step in the order of 64-bit lanes. Memory order: 32-bit lane l has the pair of
// columns 2 l and 2 l + 1. Split order: interleaving within 128 bits puts columns in order.
enum class Order { kMemory, kSplit };

// Words of `steps` steps, by pairs: (w0, w1) in even lanes and (w2, w3) in odd ones.
FLATKERN_INLINE void philox_steps(const PhiloxRow& r, uint32_t group, int steps, Order order,
                                  Batch& batch) {
  const VUint64 m0 = VUint64{} + kPhiloxM0, m1 = VUint64{} + kPhiloxM1;
  constexpr int kLast = kPhiloxRounds - 4;
  const uint64_t keys = static_cast<uint64_t>(r.k[2 * kLast + 1]) << 32 | r.k[2 * kLast];
  const VUint last_keys = (VUint)(VUint64{} + keys);
  VUint64 groups;
  for (int l = 0; l < kLanes / 2; ++l) {
    groups[l] = group + (order == Order::kMemory ? l : l / 2 + l % 2 * (kLanes / 4));
  }
  // Two steps at a time, which keeps the multipliers busy.
  for (int i = 0; i < steps; i += 2) {
    // A 64-bit lane holds a word in its low half; the upper one is garbage.
    VUint64 c0[2], c1[2], c2[2], c3[2];
    for (int u = 0; u < 2; ++u, groups += kStep / 4) {
      const VUint64 p0 = multiply_low(groups ^ r.c0_1, m0);
      const VUint64 p1 = multiply_low((p0 >> 32) ^ r.c2_2, m1);
      c0[u] = (p1 >> 32) ^ r.c0_3;
      c1[u] = p1;
      c2[u] = p0 ^ r.c2_3;
      c3[u] = VUint64{} + r.c3_3;
    }
#pragma GCC unroll 8
    for (int round = 0; round < kLast; ++round) {
      for (int u = 0; u < 2; ++u) {
        const VUint64 q0 = multiply_low(c0[u], m0), q1 = multiply_low(c2[u], m1);
        c0[u] = (q1 >> 32) ^ c1[u] ^ r.k[2 * round];
        c1[u] = q1;
        c2[u] = (q0 >> 32) ^ c3[u] ^ r.k[2 * round + 1];
        c3[u] = q0;
      }
    }
    // The last round puts w0 and w1, of q1, beside w2 and w3, of q0.
    for (int u = 0; u < 2; ++u) {
      const VUint q0 = (VUint)multiply_low(c0[u], m0), q1 = (VUint)multiply_low(c2[u], m1);
      batch.first[i + u] = odd_lanes(q1, q0) ^ even_lanes((VUint)c1[u], (VUint)c3[u]) ^ last_keys;
      batch.second[i + u] = even_lanes(q1, q0);
    }
  }
}

// -2 ln(x / 2^32) for x in [1/2, 2^32]: x = 2^k (1 + f), 1 + f in [sqrt 1/2, sqrt 2), and a minimax
// fit of -2 ln(1 + f) / f, relative, below 1.2e-6.
FLATKERN_INLINE VFloat minus_two_log(VFloat x) {
  const VUint bits = (VUint)x;
  const VUint power = (bits - 0x3F3504F3u) & 0xFF800000u;  // k 2^23
  const VFloat f = (VFloat)(bits - power) - 1.0f;
  const VFloat halvings = __builtin_convertvector((VInt)((32u << 23) - power), VFloat);
  const VFloat q = polynomial(f, -0.23792216f, 0.37335710f, -0.40992658f, 0.49819488f, -0.66629018f,
                              1.00002226f, -2.00000195f);
  return multiply_add(halvings, splat(1.38629436f * 0x1p-23f), f * q);
}

// sqrt(-2 ln u)
FLATKERN_INLINE VFloat radius_of(VUint word) {
  const VFloat square = minus_two_log(float_of_uint(word) + 0.5f);
  // Rounding can leave -0 or a few ulps below 0 where u is 1.
  return square_root(square > 0.0f ? square : VFloat{});
}

// Normals of columns 0 and 1, 2 and 3 of each group.
struct Normals {
  VFloat even, odd;
};

// radius (cos pi v, sin pi v)
FLATKERN_INLINE Normals turned(VFloat radius, VUint word) {
  // Half angles need no reduction: cos = 1 - s^2 and sin = s c with s = sqrt 2 sin(pi v / 2) and
  // c = sqrt 2 cos(pi v / 2). Minimax fits over [-1, 1], below 5e-9 and 4e-8.
  const VFloat v = __builtin_convertvector((VInt)word, VFloat) * 0x1p-31f;
  const VFloat v2 = v * v;
  const VFloat s = v * polynomial(v2, 0.000213295421f, -0.00660753516f, 0.112696536f, -0.913530146f,
                                  2.22144142f);
  const VFloat c =
      polynomial(v2, 0.00120544169f, -0.0294122108f, 0.358702524f, -1.74470893f, 1.41421321f);
  return {radius * multiply_add(-s, s, splat(1.0f)), radius * (s * c)};
}

__attribute__((noinline)) static void fill(Batch& batch, const PhiloxRow& r, uint32_t group,
                                           int steps, Order order) {
  philox_steps(r, group, steps, order, batch);
  for (int i = 0; i < steps; ++i) batch.radius[i] = radius_of(batch.first[i]);
}

// One step's normals in the order of columns.
template <Order order>
FLATKERN_INLINE void spread(const Normals& z, float* values) {
  if constexpr (order == Order::kSplit) {
    store(values, interleave_low(z.even, z.odd));
    store(values + kLanes, interleave_high(z.even, z.odd));
  } else {
    for (int l = 0; l < kLanes; ++l) {
      values[2 * l] = z.even[l];
      values[2 * l + 1] = z.odd[l];
    }
  }
}

// What a step's words become: normals, or uniform values in (-1, 1) in the same places.
struct Gaussian {
  FLATKERN_INLINE void fill(Batch& batch, const PhiloxRow& r, uint32_t group, int steps,
                            Order order) {
    FLATKERN_ISA::fill(batch, r, group, steps, order);
  }
  FLATKERN_INLINE Normals values(const Batch& batch, int i) {
    return turned(batch.radius[i], batch.second[i]);
  }
};
struct Uniform {
  FLATKERN_INLINE void fill(Batch& batch, const PhiloxRow& r, uint32_t group, int steps,
                            Order order) {
    philox_steps(r, group, steps, order, batch);
  }
  // unit_uniform, a vector at a time.
  FLATKERN_INLINE VFloat unit(VUint word) {
    const VUint odd = (word >> 7 | 1u) - (1u << 24);
    return __builtin_convertvector((VInt)odd, VFloat) * 0x1p-24f;
  }
  FLATKERN_INLINE Normals values(const Batch& batch, int i) {
    return {unit(batch.first[i]), unit(batch.second[i])};
  }
};

// Walks columns [begin, end) of one row in steps that start on a group: `whole(j, normals)` for
// steps that lie inside, `part(j, count, values)` for those that stick out.
template <Order order, class Draw = Gaussian, class Whole, class Part>
FLATKERN_INLINE void for_each_step(const Block& w, int64_t row, int64_t begin, int64_t end,
                                   const Whole& whole, const Part& part) {
  const PhiloxRow r = philox_row(w.key, static_cast<uint32_t>(w.row_offset + row));
  Batch batch;
  int64_t j = begin;
  while (j < end) {
    const uint64_t column = w.col_offset + j;
    const uint32_t group = static_cast<uint32_t>(column / 4);
    const int lane = static_cast<int>(column % 4);
    const int64_t left = end - j;
    if (lane == 0 && left >= kStep) {
      const int steps = static_cast<int>(left < kBatch * kStep ? left / kStep : kBatch);
      Draw::fill(batch, r, group, steps, order);
      for (int i = 0; i < steps; ++i, j += kStep) whole(j, Draw::values(batch, i));
      continue;
    }
    // A misaligned start runs to the end of its first step; a tail to the end of the range.
    Draw::fill(batch, r, group, 1, order);
    float values[kStep];
    spread<order>(Draw::values(batch, 0), values);
    const int count = static_cast<int>(left < kStep - lane ? left : kStep - lane);
    part(j, count, values + lane);
    j += count;
  }
}

// Calls f(row, begin, end) for the columns of each work unit.
template <class F>
FLATKERN_INLINE void for_each_block(const Block& w, int64_t unit_begin, int64_t unit_end,
                                    const F& f) {
  const int64_t blocks = blocks_per_row(w.cols);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t row = unit / blocks, begin = unit % blocks * kBlockCols;
    f(row, begin, begin + kBlockCols < w.cols ? begin + kBlockCols : w.cols);
  }
}

// Values of columns [begin, end) of one row, from `out` on.
template <class Draw>
FLATKERN_INLINE void draw_columns(const Block& w, int64_t row, int64_t begin, int64_t end,
                                  float* out) {
  for_each_step<Order::kSplit, Draw>(
      w, row, begin, end,
      [&](int64_t j, const Normals& z) {
        store(out + (j - begin), interleave_low(z.even, z.odd));
        store(out + (j - begin) + kLanes, interleave_high(z.even, z.odd));
      },
      [&](int64_t j, int count, const float* values) {
        memcpy(out + (j - begin), values, count * sizeof(float));
      });
}

template <class Draw>
FLATKERN_INLINE void draw(const NoiseArgs& args, int64_t unit_begin, int64_t unit_end) {
  const Block w = args.block;
  for_each_block(w, unit_begin, unit_end, [&](int64_t row, int64_t begin, int64_t end) {
    draw_columns<Draw>(w, row, begin, end, static_cast<float*>(args.out) + row * w.cols + begin);
  });
}

void noise(const NoiseArgs& args, int64_t unit_begin, int64_t unit_end) {
  const KeepDenormals keep;
  draw<Gaussian>(args, unit_begin, unit_end);
}

void uniform(const NoiseArgs& args, int64_t unit_begin, int64_t unit_end) {
  draw<Uniform>(args, unit_begin, unit_end);
}

void philox_bits(const NoiseArgs& args, int64_t unit_begin, int64_t unit_end) {
  const Block w = args.block;
  for_each_block(w, unit_begin, unit_end, [&](int64_t row, int64_t begin, int64_t end) {
    int64_t* out = static_cast<int64_t*>(args.out) + row * w.cols;
    const PhiloxRow r = philox_row(w.key, static_cast<uint32_t>(w.row_offset + row));
    for (int64_t j = begin; j < end; ++j) {
      const uint64_t column = w.col_offset + j;
      out[j] = philox_group(r, static_cast<uint32_t>(column / 4)).w[column % 4];
    }
  });
}

}  // namespace flatkern::cpu::FLATKERN_ISA

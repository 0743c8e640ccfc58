// Philox words and normals, a vector step at a time. Compiled once per instruction set.

namespace flatkern::cpu::FLATKERN_ISA {

// Words of kLanes / 2 consecutive groups, one group a 64-bit lane; upper halves are garbage.
struct WideWords {
  VUint64 w[4];
};

FLATKERN_INLINE WideWords philox_groups(const PhiloxRow& r, uint32_t group) {
  const VUint64 m0 = VUint64{} + kPhiloxM0, m1 = VUint64{} + kPhiloxM1;
  VUint64 lane;
  for (int i = 0; i < kLanes / 2; ++i) lane[i] = i;
  const VUint64 p0 = multiply_low((lane + group) ^ r.c0_1, m0);
  const VUint64 p1 = multiply_low((p0 >> 32) ^ r.c2_2, m1);
  VUint64 c0 = (p1 >> 32) ^ r.c0_3, c1 = p1, c2 = p0 ^ r.c2_3, c3 = VUint64{} + r.c3_3;
  uint32_t k0 = r.k[0], k1 = r.k[1];
#pragma GCC unroll 8
  for (int round = 3; round < kPhiloxRounds; ++round) {
    const VUint64 q0 = multiply_low(c0, m0), q1 = multiply_low(c2, m1);
    c0 = (q1 >> 32) ^ c1 ^ k0;
    c1 = q1;
    c2 = (q0 >> 32) ^ c3 ^ k1;
    c3 = q0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// -2 ln u for u in [2^-33, 1]: u = 2^e (1 + f), 1 + f in [sqrt 1/2, sqrt 2), and a minimax fit of
// (-2 ln(1 + f) + 2 f - f^2) / f^3, weighted relative; below 3e-8 of the radius.
FLATKERN_INLINE VFloat minus_two_log(VFloat u) {
  const VUint bits = (VUint)u;
  const VInt exponent = (VInt)(bits - 0x3F3504F3u) >> 23;
  const VFloat f = (VFloat)(bits - ((VUint)exponent << 23)) - 1.0f;
  VFloat q = -0.17580531f * f + 0.28733093f;
  q = q * f - 0.29857895f;
  q = q * f + 0.33129355f;
  q = q * f - 0.39920154f;
  q = q * f + 0.50003487f;
  q = q * f - 0.66668016f;
  const VFloat f2 = f * f;
  const VFloat log1p = (q * f + 1.0f) * f2 - (f + f);
  return __builtin_convertvector(exponent, VFloat) * -1.38629436f + log1p;
}

// sin(pi t) for t in [0, 1/2], minimax, below 4e-9.
FLATKERN_INLINE VFloat sin_pi(VFloat t) {
  const VFloat t2 = t * t;
  VFloat p = 0.07722012f * t2 - 0.59804517f;
  p = p * t2 + 2.55003142f;
  p = p * t2 - 5.16770697f;
  p = p * t2 + 3.14159250f;
  return p * t;
}

// kStep normals of adjacent columns, from the group of the first.
FLATKERN_INLINE void normals(const PhiloxRow& r, uint32_t group, VFloat& first, VFloat& second) {
  const WideWords words = philox_groups(r, group);
  // Lanes [w0 w2 w0 w2 ...] of consecutive groups, and [w1 w3 w1 w3 ...].
  const VUint a = (VUint)((words.w[0] & 0xFFFFFFFFu) | (words.w[2] << 32));
  const VUint b = (VUint)((words.w[1] & 0xFFFFFFFFu) | (words.w[3] << 32));

  const VFloat u = float_of_uint(a) * 0x1p-32f + 0x1p-33f;
  // Rounding can leave -0 or a few ulps below 0 where u is 1.
  const VFloat square = minus_two_log(u);
  const VFloat radius = square_root(square > 0.0f ? square : VFloat{});

  const VFloat v = __builtin_convertvector((VInt)b, VFloat) * 0x1p-31f;
  const VFloat turn = absolute(v);
  const VFloat from_quarter = 0.5f - turn;
  const VFloat to_axis = turn < 0.5f ? turn : 1.0f - turn;
  const VUint cos_sign = (VUint)from_quarter & 0x80000000u, sin_sign = b & 0x80000000u;
  const VFloat cosine = (VFloat)((VUint)sin_pi(absolute(from_quarter)) ^ cos_sign);
  const VFloat sine = (VFloat)((VUint)sin_pi(to_axis) ^ sin_sign);
  interleave(radius * cosine, radius * sine, first, second);
}

// Walks columns [begin, end) of one row in steps that start on a group: `whole(j, first, second)`
// for steps that lie inside, `part(j, lane, count, values)` for those that stick out, where
// values[lane .. lane + count) belong to columns j .. j + count.
template <class Whole, class Part>
FLATKERN_INLINE void for_each_step(const Window& w, int64_t row, int64_t begin, int64_t end,
                                   const Whole& whole, const Part& part) {
  const PhiloxRow r = philox_row(w.key, static_cast<uint32_t>(w.row_offset + row));
  int64_t j = begin;
  while (j < end) {
    const uint64_t column = w.col_offset + j;
    const uint32_t group = static_cast<uint32_t>(column / 4);
    const int lane = static_cast<int>(column % 4);
    VFloat first, second;
    normals(r, group, first, second);
    if (lane == 0 && end - j >= kStep) {
      whole(j, first, second);
      j += kStep;
      continue;
    }
    // A misaligned start runs to the end of its first step; a tail to the end of the range.
    float values[kStep];
    store(values, first);
    store(values + kLanes, second);
    const int64_t left = end - j;
    const int count = static_cast<int>(left < kStep - lane ? left : kStep - lane);
    part(j, lane, count, values);
    j += count;
  }
}

// Calls f(row, begin, end) for the columns of each work unit.
template <class F>
FLATKERN_INLINE void for_each_block(const Window& w, int64_t unit_begin, int64_t unit_end,
                                    const F& f) {
  const int64_t blocks = blocks_per_row(w.cols);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t row = unit / blocks, begin = unit % blocks * kBlockCols;
    f(row, begin, begin + kBlockCols < w.cols ? begin + kBlockCols : w.cols);
  }
}

void noise(const NoiseArgs& args, int64_t unit_begin, int64_t unit_end) {
  const KeepDenormals keep;
  const Window w = args.window;
  for_each_block(w, unit_begin, unit_end, [&](int64_t row, int64_t begin, int64_t end) {
    float* out = static_cast<float*>(args.out) + row * w.cols;
    for_each_step(
        w, row, begin, end,
        [&](int64_t j, VFloat first, VFloat second) {
          store(out + j, first);
          store(out + j + kLanes, second);
        },
        [&](int64_t j, int lane, int count, const float* values) {
          memcpy(out + j, values + lane, count * sizeof(float));
        });
  });
}

void philox_bits(const NoiseArgs& args, int64_t unit_begin, int64_t unit_end) {
  const Window w = args.window;
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

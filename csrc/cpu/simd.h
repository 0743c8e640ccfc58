// Vectors of the width that the including file's instruction set has. Included by isa_*.cpp alone,
// after FLATKERN_ISA (a namespace) and FLATKERN_VECTOR_BYTES are set and the target is switched.
//
// Plain vector extensions but for the few operations that compilers miss. Nothing is approximated,
// and fused only by multiply_add, so every width gives the same bits.

namespace flatkern::cpu::FLATKERN_ISA {

constexpr int kLanes = FLATKERN_VECTOR_BYTES / 4;
// One step of the noise: kLanes / 2 Philox calls fill two vectors of adjacent columns.
constexpr int kStep = 2 * kLanes;

typedef float VFloat __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
typedef uint32_t VUint __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
typedef int32_t VInt __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
typedef uint64_t VUint64 __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
typedef uint16_t VHalf __attribute__((vector_size(FLATKERN_VECTOR_BYTES / 2)));

#define FLATKERN_INLINE static inline __attribute__((always_inline))

// The value in every lane. Subtracting zero keeps -0, which adding would not.
FLATKERN_INLINE VFloat splat(float value) { return value - VFloat{}; }

template <class V, class T>
FLATKERN_INLINE V load_vector(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
FLATKERN_INLINE void store_vector(T* p, V v) {
  memcpy(p, &v, sizeof v);
}

// Products of the low halves of 64-bit lanes. Compilers pick a full 64-bit multiply instead.
FLATKERN_INLINE VUint64 multiply_low(VUint64 a, VUint64 b) {
#if defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 64
  return (VUint64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 32
  return (VUint64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (VUint64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// a b + c, rounded once where the instruction set can: everywhere but on x86 without FMA.
FLATKERN_INLINE VFloat multiply_add(VFloat a, VFloat b, VFloat c) {
#if defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 64
  return (VFloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 32
  return (VFloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// Horner's scheme from the highest coefficient on.
template <class... Rest>
FLATKERN_INLINE VFloat polynomial(VFloat x, float leading, Rest... rest) {
  VFloat sum = splat(leading);
  ((sum = multiply_add(sum, x, splat(rest))), ...);
  return sum;
}

FLATKERN_INLINE VFloat square_root(VFloat a) {
#if defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 64
  return (VFloat)_mm512_sqrt_ps((__m512)a);
#elif defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 32
  return (VFloat)_mm256_sqrt_ps((__m256)a);
#elif defined(__x86_64__)
  return (VFloat)_mm_sqrt_ps((__m128)a);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

// uint32 -> float, rounded to nearest: the two halves are exact, their sum is rounded once.
FLATKERN_INLINE VFloat float_of_uint(VUint a) {
#if defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 64
  return (VFloat)_mm512_cvtepu32_ps((__m512i)a);
#else
  const VFloat upper = __builtin_convertvector((VInt)(a >> 16), VFloat);
  const VFloat lower = __builtin_convertvector((VInt)(a & 0xFFFFu), VFloat);
  return upper * 65536.0f + lower;
#endif
}

// Shuffles of two vectors, lanes of a and b in turn: those with even and odd numbers, and the lower
// and upper halves of each 128 bits.
#if FLATKERN_VECTOR_BYTES == 64
#define FLATKERN_EVEN_LANES 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define FLATKERN_ODD_LANES 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define FLATKERN_LOW_LANES 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define FLATKERN_HIGH_LANES 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#elif FLATKERN_VECTOR_BYTES == 32
#define FLATKERN_EVEN_LANES 0, 8, 2, 10, 4, 12, 6, 14
#define FLATKERN_ODD_LANES 1, 9, 3, 11, 5, 13, 7, 15
#define FLATKERN_LOW_LANES 0, 8, 1, 9, 4, 12, 5, 13
#define FLATKERN_HIGH_LANES 2, 10, 3, 11, 6, 14, 7, 15
#else
#define FLATKERN_EVEN_LANES 0, 4, 2, 6
#define FLATKERN_ODD_LANES 1, 5, 3, 7
#define FLATKERN_LOW_LANES 0, 4, 1, 5
#define FLATKERN_HIGH_LANES 2, 6, 3, 7
#endif
#ifdef __clang__
#define FLATKERN_SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FLATKERN_SHUFFLE(...) __builtin_shuffle(a, b, VInt{__VA_ARGS__})
#endif
FLATKERN_INLINE VUint even_lanes(VUint a, VUint b) { return FLATKERN_SHUFFLE(FLATKERN_EVEN_LANES); }
FLATKERN_INLINE VUint odd_lanes(VUint a, VUint b) { return FLATKERN_SHUFFLE(FLATKERN_ODD_LANES); }
FLATKERN_INLINE VFloat interleave_low(VFloat a, VFloat b) {
  return FLATKERN_SHUFFLE(FLATKERN_LOW_LANES);
}
FLATKERN_INLINE VFloat interleave_high(VFloat a, VFloat b) {
  return FLATKERN_SHUFFLE(FLATKERN_HIGH_LANES);
}
#undef FLATKERN_SHUFFLE
#undef FLATKERN_EVEN_LANES
#undef FLATKERN_ODD_LANES
#undef FLATKERN_LOW_LANES
#undef FLATKERN_HIGH_LANES

// Bit i is set where lane i of a comparison is true.
FLATKERN_INLINE uint32_t lane_bits(VInt mask) {
#if defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 32
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

FLATKERN_INLINE bool any(VInt mask) { return lane_bits(mask) != 0; }

FLATKERN_INLINE VFloat absolute(VFloat a) { return (VFloat)((VUint)a & 0x7FFFFFFFu); }

FLATKERN_INLINE VFloat load(const float* p) { return load_vector<VFloat>(p); }
FLATKERN_INLINE VFloat load(const BFloat16* p) {
  return (VFloat)(__builtin_convertvector(load_vector<VHalf>(p), VUint) << 16);
}
FLATKERN_INLINE VFloat load(const Float16* p) {
#if defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 64
  return (VFloat)_mm512_cvtph_ps((__m256i)load_vector<VHalf>(p));
#elif defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 32
  return (VFloat)_mm256_cvtph_ps((__m128i)load_vector<VHalf>(p));
#else
  VFloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// A bfloat16 in the upper half, garbage in the lower.
FLATKERN_INLINE VUint rounded_bfloat16(VFloat v) {
  const VUint bits = (VUint)v;
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

// Whether the exponent of a bfloat16, two a lane, is that of infinity or NaN.
FLATKERN_INLINE bool any_exponent_full(VUint pairs) {
  const VUint full = pairs & 0x7F807F80u;
#if defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 64
  return _mm512_cmpeq_epi16_mask((__m512i)full, _mm512_set1_epi16(0x7F80)) != 0;
#elif defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 32
  return _mm256_movemask_epi8(_mm256_cmpeq_epi16((__m256i)full, _mm256_set1_epi16(0x7F80))) != 0;
#else
  return any(((full & 0xFFFFu) == 0x7F80u) | ((full >> 16) == 0x7F80u));
#endif
}

// Finite values alone; kernels send the others through numeric.h, one by one.
FLATKERN_INLINE void store(float* p, VFloat v) { store_vector(p, v); }
FLATKERN_INLINE void store(BFloat16* p, VFloat v) {
  store_vector(p, __builtin_convertvector(rounded_bfloat16(v) >> 16, VHalf));
}
FLATKERN_INLINE void store(Float16* p, VFloat v) {
#if defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 64
  store_vector(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__x86_64__) && FLATKERN_VECTOR_BYTES == 32
  store_vector(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = round_to<Float16>(v[i]);
#endif
}

// The first magnitude that rounds to infinity.
FLATKERN_INLINE float overflow_of(const float*) { return __builtin_inff(); }
FLATKERN_INLINE float overflow_of(const BFloat16*) { return 0x1.FFp127f; }
FLATKERN_INLINE float overflow_of(const Float16*) { return 65520.0f; }

// The noise may not depend on torch.set_flush_denormal: denormals are kept while a kernel runs.
class KeepDenormals {
#if defined(__x86_64__)
 public:
  KeepDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~KeepDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace flatkern::cpu::FLATKERN_ISA

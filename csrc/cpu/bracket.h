// Where W must be, given S and the noise: the ranges of the residual. Compiled once per
// instruction set. Every float operation rounds once; none is contracted.

namespace flatkern::cpu::FLATKERN_ISA {

// The codes base .. base + span, sign included, among which W must be; 0, 0 if too many.
struct Bracket {
  VUint base, span;
};

FLATKERN_INLINE VUint splat_bits(uint32_t value) { return VUint{} + value; }

// 2^E, E the exponent of s but at least the dtype's smallest.
template <class T>
FLATKERN_INLINE VUint exponent_of(VFloat s) {
  const VUint exponent = (VUint)s & 0x7F800000u;
  // Signed comparisons are the cheap ones; magnitudes have no sign bit.
  return (VInt)exponent > (VInt)splat_bits(Precision<T>::kMinExponent)
             ? exponent
             : splat_bits(Precision<T>::kMinExponent);
}

// A float32 magnitude's code rounded towards zero.
FLATKERN_INLINE VUint truncate(VUint code, const BFloat16*) { return code >> 16; }
FLATKERN_INLINE VUint truncate(VUint code, const Float16*) {
  const VInt magnitude = (VInt)code;
  // Below the smallest normal number, 2^-14, codes count steps of 2^-24.
  const VUint small = (VUint) __builtin_convertvector((VFloat)code * 0x1p24f, VInt);
  const VUint normal = (code - 0x38000000u) >> 13;
  const VUint large = magnitude < 0x7F800000 ? splat_bits(0x7BFFu) : splat_bits(0x7C00u);
  const VUint fits = magnitude < 0x38800000 ? small : normal;
  return magnitude < 0x47800000 ? fits : large;
}

// Ranges that reach zero or hold more than 256 codes become 0, 0.
FLATKERN_INLINE Bracket narrow(VInt possible, VFloat low, VUint base, VUint top, VUint sign) {
  const VUint span = top - base;
  const VUint keep = (VUint)(possible & (low > 0.0f) & ((span >> 8) == 0u));
  return {(base | sign) & keep, span & keep};
}

// A 16-bit dtype; s is S and e the noise, or its factor of |W|.
template <class T>
FLATKERN_INLINE Bracket bracket(VFloat s, VFloat e, bool elementwise, const T* dtype) {
  constexpr uint32_t kBits = Precision<T>::kBits;
  // Half a gap of S and two float32 ulps; elementwise rounds twice more.
  const uint32_t slack = 1u << (kBits + 1 + elementwise);
  VFloat half = (VFloat)(exponent_of<T>(s) - (kBits << 23) + slack);
  VInt possible = VInt{} - 1;
  VFloat size;
  VUint sign;
  if (elementwise) {
    sign = ((VUint)s >> 16) & 0x8000u;
    const VFloat factor = 1.0f + (VFloat)((VUint)e ^ ((VUint)s & 0x80000000u));
    const VFloat inverse = 1.0f / factor;
    possible = factor > 0.0625f;
    size = absolute(s) * inverse;
    half = half * inverse;
  } else {
    const VFloat before = s - e;
    sign = ((VUint)before >> 16) & 0x8000u;
    size = absolute(before);
  }
  const VFloat low = size - half, high = size + half;
  const VUint base = truncate((VUint)low - 1u, dtype) + 1u;
  return narrow(possible, low, base, truncate((VUint)high, dtype), sign);
}

// float32 has no spare bits: the exact error of S - e, and the tie rule. Never elementwise.
FLATKERN_INLINE Bracket bracket(VFloat s, VFloat e, bool, const float*) {
  const VFloat before = s - e;
  const VUint sign = (VUint)before & 0x80000000u;
  const VFloat error = (VFloat)((VUint)((s - before) - e) ^ sign), size = absolute(before);
  const VFloat half = (VFloat)(exponent_of<float>(s) - (24u << 23));
  const VInt odd = ((VUint)s & 1u) == 1u;
  const VFloat down = error - half, up = error + half;
  const VFloat low = size + down, high = size + up;
  const VFloat below = down - (low - size), above = up - (high - size);
  // True is -1.
  const VUint base = (VUint)low - (VUint)((below > 0.0f) | ((below == 0.0f) & odd));
  const VUint top = (VUint)high + (VUint)((above < 0.0f) | ((above == 0.0f) & odd));
  return narrow(VInt{} - 1, low, base, top, sign);
}

// Bits that hold a number up to span < 256.
FLATKERN_INLINE VUint width_of(VUint span) {
  const VInt exponent = (VInt) __builtin_convertvector((VInt)span, VFloat) >> 23;
  return (VUint)(exponent > 126 ? exponent - 126 : VInt{});
}

// S - e rounded half-up, in code space, to a multiple of 2^grid.
FLATKERN_INLINE VUint round_to_grid(VFloat s, VFloat e, uint32_t grid) {
  const VFloat before = s - e;
  const VUint rounded = (((VUint)before + (1u << (grid - 1))) >> grid) << grid;
  return before == 0.0f ? VUint{} : rounded;
}

// Bit patterns, zero-extended.
FLATKERN_INLINE VUint load_codes(const float* p) { return load_vector<VUint>(p); }
FLATKERN_INLINE VUint load_codes(const BFloat16* p) {
  return __builtin_convertvector(load_vector<VHalf>(p), VUint);
}
FLATKERN_INLINE VUint load_codes(const Float16* p) {
  return __builtin_convertvector(load_vector<VHalf>(p), VUint);
}
FLATKERN_INLINE void store_codes(float* p, VUint v) { store_vector(p, v); }
template <class T>
FLATKERN_INLINE void store_codes(T* p, VUint v) {
  store_vector(p, __builtin_convertvector(v, VHalf));
}

FLATKERN_INLINE uint32_t sum_lanes(VUint v) {
  uint32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
FLATKERN_INLINE uint32_t or_lanes(VUint v) {
  uint32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= v[i];
  return all;
}

}  // namespace flatkern::cpu::FLATKERN_ISA

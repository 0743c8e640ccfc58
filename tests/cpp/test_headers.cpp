// Holds philox.h and numeric.h against the published vectors and against rules written another way:
// values by ldexp, rounding by comparing distances in double. Prints what fails; counts it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "numeric.h"
#include "philox.h"

using namespace flatkern;

static int failures = 0;

#define CHECK(condition, ...)                                       \
  do {                                                              \
    if (!(condition)) {                                             \
      if (++failures <= 20) {                                       \
        std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::printf(__VA_ARGS__);                                   \
        std::printf("\n");                                          \
      }                                                             \
    }                                                               \
  } while (0)

static uint64_t random_state = 88172645463325252ull;
static uint32_t random_word() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 16);
}

static bool same_bits(float a, float b) { return bits_of_float(a) == bits_of_float(b); }

static void test_published_vectors(const char* path) {
  std::ifstream file(path);
  std::string line;
  int seven = 0, ten = 0;
  while (std::getline(file, line)) {
    std::istringstream fields(line);
    std::string name;
    int rounds;
    if (!(fields >> name) || name != "philox4x32" || !(fields >> rounds)) continue;
    uint32_t value[10];
    for (uint32_t& word : value) fields >> std::hex >> word;
    CHECK(!fields.fail(), "cannot read '%s'", line.c_str());
    const Words counter = {{value[0], value[1], value[2], value[3]}};
    const Words words = rounds == 7 ? philox4x32<7>(counter, value[4], value[5])
                                    : philox4x32<10>(counter, value[4], value[5]);
    CHECK(rounds == 7 || rounds == 10, "%d rounds", rounds);
    CHECK(std::memcmp(words.w, value + 6, sizeof words.w) == 0, "%s", line.c_str());
    (rounds == 7 ? seven : ten) += 1;
    if (rounds != 10) continue;
    const PhiloxRow row = philox_row({value[4], value[5], value[3], value[2]}, value[0]);
    const Words hoisted = philox_group(row, value[1]);
    CHECK(std::memcmp(hoisted.w, value + 6, sizeof hoisted.w) == 0, "by row: %s", line.c_str());
  }
  CHECK(seven == 3 && ten == 3, "%d and %d vectors in %s", seven, ten, path);
}

static void test_rows_equal_the_generator() {
  for (int i = 0; i < 200000; ++i) {
    const NoiseKey key = {random_word(), random_word(), random_word(), random_word()};
    const uint32_t row = random_word(), group = random_word();
    const Words whole = philox4x32<>({{row, group, key.tensor, key.draw}}, key.seed, key.step);
    const Words hoisted = philox_group(philox_row(key, row), group);
    CHECK(std::memcmp(whole.w, hoisted.w, sizeof whole.w) == 0, "row %u group %u", row, group);
  }
}

static void test_uniforms() {
  const uint32_t edges[] = {0,
                            1,
                            127,
                            128,
                            129,
                            1u << 24,
                            (1u << 24) + 1,
                            (1u << 24) + 3,
                            0x7FFFFFFFu,
                            0x80000000u,
                            0x80000001u,
                            0xFFFFFF7Fu,
                            0xFFFFFF80u,
                            0xFFFFFFFFu};
  const auto check = [](uint32_t word) {
    // Each step exact in double, then one rounding to float, as specified.
    const float a = static_cast<float>(static_cast<double>(word));
    const float u = static_cast<float>(std::ldexp(static_cast<double>(a), -32) + 0x1p-33);
    CHECK(same_bits(radius_uniform(word), u), "u of %u: %a, not %a", word, radius_uniform(word), u);
    CHECK(u > 0.0f && u <= 1.0f, "u of %u is %a", word, u);
    const double centred = word < 0x80000000u ? word : static_cast<double>(word) - 0x1p32;
    const float v = static_cast<float>(std::ldexp(centred, -31));
    CHECK(same_bits(angle_uniform(word), v), "v of %u: %a, not %a", word, angle_uniform(word), v);
  };
  for (uint32_t word : edges) check(word);
  for (int i = 0; i < 200000; ++i) check(random_word());
}

struct Format {
  int mantissa_bits, bias;
};
constexpr Format kBFloat16Format = {7, 127}, kFloat16Format = {10, 15};

// The value of a 16-bit code from its three fields.
static double value_of(uint16_t code, Format f) {
  const int mantissa = code & ((1 << f.mantissa_bits) - 1);
  const int exponent = (code & 0x7FFF) >> f.mantissa_bits;
  const double sign = code & 0x8000 ? -1.0 : 1.0;
  if (exponent == (0x7FFF >> f.mantissa_bits)) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  }
  const double fraction = exponent ? mantissa + (1 << f.mantissa_bits) : mantissa;
  return sign * std::ldexp(fraction, std::max(exponent, 1) - f.bias - f.mantissa_bits);
}

template <class T>
static uint16_t code_of(float value) {
  return round_to<T>(value).bits;
}

// Nearest of the two neighbours, ties to the even code; the code after the largest is infinity,
// which rounding reaches as if the exponents went on.
static uint16_t nearest(float value, Format f) {
  const uint16_t infinity = 0x7FFF >> f.mantissa_bits << f.mantissa_bits;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(static_cast<double>(value));
  if (std::isinf(size)) return sign | infinity;
  uint16_t low = 0, high = infinity;
  const auto magnitude = [&](uint16_t code) {
    if (code < infinity) return value_of(code, f);
    return std::ldexp(1.0, (0x7FFF >> f.mantissa_bits) - f.bias);
  };
  if (size >= magnitude(infinity)) return sign | infinity;
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (magnitude(middle) <= size ? low : high) = middle;
  }
  const double below = size - magnitude(low), above = magnitude(high) - size;
  if (below < above) return sign | low;
  if (above < below) return sign | high;
  return sign | (low % 2 ? high : low);
}

template <class T>
static void check_rounding(float value, Format f, const char* name) {
  const uint16_t got = code_of<T>(value), expected = nearest(value, f);
  CHECK(got == expected, "%s of %a: %04x, not %04x", name, value, got, expected);
}

template <class T>
static void test_format(Format f, const char* name) {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const double value = value_of(code, f);
    const float widened = to_float(T{static_cast<uint16_t>(code)});
    if (std::isnan(value)) {
      CHECK(std::isnan(widened), "%s %04x is %a", name, code, widened);
      CHECK(std::isnan(value_of(code_of<T>(widened), f)), "%s %04x does not stay NaN", name, code);
      continue;
    }
    const bool exact = static_cast<double>(widened) == value;
    CHECK(exact && std::signbit(widened) == (code >= 0x8000), "%s %04x is %a", name, code, widened);
    CHECK(code_of<T>(widened) == code, "%s %04x comes back as %04x", name, code,
          code_of<T>(widened));
    // The tie above it and the floats around the tie; beyond the largest, the tie with infinity.
    const double next = value_of(code & 0x7FFF, f) +
                        std::ldexp(1.0, std::max((code & 0x7FFF) >> f.mantissa_bits, 1u) - f.bias -
                                            f.mantissa_bits);
    if (std::isinf(value)) continue;
    const double sign = code >= 0x8000 ? -1.0 : 1.0;
    const float tie = static_cast<float>(sign * 0.5 * (std::fabs(value) + next));
    check_rounding<T>(tie, f, name);
    check_rounding<T>(std::nextafterf(tie, 0.0f), f, name);
    check_rounding<T>(std::nextafterf(tie, static_cast<float>(sign * INFINITY)), f, name);
  }
  for (uint64_t bits = 0; bits < (1ull << 32); bits += 4099) {
    const float value = float_of_bits(static_cast<uint32_t>(bits));
    if (!std::isnan(value)) check_rounding<T>(value, f, name);
  }
  for (int i = 0; i < 1000; ++i) {
    // The first has its payload in bits that the 16-bit format lacks.
    const float nan = float_of_bits(0x7F800001u + (i ? random_word() % 0x7FFFFFu : 0));
    CHECK(std::isnan(value_of(code_of<T>(nan), f)), "%s of a NaN", name);
    CHECK(code_of<T>(float_of_bits(bits_of_float(nan) | 0x80000000u)) >= 0x8000,
          "%s loses a NaN's sign", name);
  }
}

static void test_perturbed_value() {
  // c z is rounded before the sum. Here it is 1 + 2^-11 + 2^-24, rounded to even without its last
  // bit: a fused multiply-add would leave 2^-24.
  const float c = 1.0f + 0x1p-12f, w = -(1.0f + 0x1p-11f);
  CHECK(same_bits(perturbed_value(w, c, c, false), 0.0f), "a product is not rounded");
  int fused = 0;
  for (int i = 0; i < 100000; ++i) {
    const float x =
        std::ldexp(1.0f + random_word() * 0x1p-32f, static_cast<int>(random_word() % 8));
    const float scale = random_word() * 0x1p-32f,
                z = static_cast<int32_t>(random_word()) * 0x1p-29f;
    volatile float e = scale * z;
    volatile float sum = x + e;
    CHECK(same_bits(perturbed_value(x, scale, z, false), sum), "%a + %a * %a", x, scale, z);
    fused += !same_bits(sum, std::fmaf(scale, z, x));
    volatile float relative = e * std::fabs(x);
    volatile float elementwise = -x + relative;
    CHECK(same_bits(perturbed_value(-x, scale, z, true), elementwise), "%a elementwise", x);
    volatile float difference = sum - e;
    CHECK(same_bits(restored_value(sum, scale, z, false), difference), "%a - %a * %a", x, scale, z);
  }
  for (int i = 0; i < 10000; ++i) {
    const float w = static_cast<int32_t>(random_word()) * 0x1p-20f;
    const float z = static_cast<int32_t>(random_word()) * 0x1p-32f;
    const float noisy = perturbed_value(w, 1.0f, z, true);
    const float restored = restored_value(noisy, 1.0f, z, true);
    CHECK(std::fabs(restored - w) <= 4e-7f * std::fabs(w), "%a restored to %a", w, restored);
  }
  CHECK(restored_value(0.0f, 1.0f, 0.5f, true) == 0.0f, "zero is restored to zero");
  // Noise that took all of an element or flipped its sign leaves nothing to divide by.
  CHECK(restored_value(2.0f, 1.0f, -1.0f, true) == 2.0f, "a division by zero");
  CHECK(restored_value(2.0f, 1.0f, -3.0f, true) == 2.0f, "a division by a negative factor");
  CHECK(fused > 1000, "only %d of the cases tell a fused multiply-add apart", fused);

  const float inf = INFINITY, nan = NAN;
  CHECK(usable_scale(nan) == 0.0f && usable_scale(inf) == 0.0f && usable_scale(-inf) == 0.0f,
        "a scale that is not finite counts as 0");
  CHECK(usable_scale(0x1p-149f) == 0x1p-149f && usable_scale(3e38f) == 3e38f &&
            usable_scale(-2.0f) == -2.0f,
        "finite scales are kept");
}

template <class T>
static T make(uint32_t bits) {
  T value;
  if constexpr (sizeof(T) == 4) {
    value = float_of_bits(bits);
  } else {
    value = T{static_cast<uint16_t>(bits)};
  }
  return value;
}

template <class T>
static uint32_t bits_of(T value) {
  if constexpr (sizeof(T) == 4) {
    return bits_of_float(value);
  } else {
    return value.bits;
  }
}

// An element that is not finite keeps its bits whatever is added; one whose sum would overflow too.
template <class T>
static void test_keep_finite(uint32_t infinity, uint32_t sign, const char* name) {
  for (uint32_t low : {0u, 1u, 5u, (infinity & -infinity) >> 1, (infinity & -infinity) - 1}) {
    for (uint32_t s : {0u, sign}) {
      const uint32_t bits = (infinity | low) | s;
      const T before = make<T>(bits);
      for (float e : {0.0f, 1.0f, -3e38f, INFINITY, NAN}) {
        const T after = keep_finite<T>(before, to_float(before) + e);
        CHECK(bits_of(after) == bits, "%s %08x becomes %08x", name, bits, bits_of(after));
      }
    }
  }
  for (uint32_t s : {0u, sign}) {
    const T largest = make<T>((infinity - 1) | s);
    const float value = to_float(largest), step = value - to_float(make<T>((infinity - 2) | s));
    CHECK(bits_of(keep_finite<T>(largest, value + step)) == bits_of(largest), "%s overflow", name);
    CHECK(bits_of(keep_finite<T>(largest, value - step)) == ((infinity - 2) | s), "%s step", name);
    CHECK(bits_of(keep_finite<T>(largest, INFINITY)) == bits_of(largest), "%s to infinity", name);
    CHECK(bits_of(keep_finite<T>(largest, NAN)) == bits_of(largest), "%s to NaN", name);
    const T one_step_down = make<T>((infinity - 2) | s);
    CHECK(bits_of(keep_finite<T>(one_step_down, value)) == bits_of(largest), "%s to the last",
          name);
  }
  const T smallest = make<T>(1);
  CHECK(bits_of(keep_finite<T>(smallest, 2 * to_float(smallest))) == 2, "%s denormals", name);
  CHECK(bits_of(keep_finite<T>(smallest, -to_float(smallest))) == (1 | sign), "%s denormals", name);
  CHECK(bits_of(keep_finite<T>(smallest, 0.0f)) == 0, "%s to zero", name);
}

static void test_keep_finite_in_a_cast() {
  // The sum does not fit the lower dtype: the weight itself is cast, and may not fit either.
  CHECK(bits_of(keep_finite<Float16>(65504.0f, 70000.0f)) == 0x7BFF, "largest, overflowing sum");
  CHECK(bits_of(keep_finite<Float16>(1.0f, 70000.0f)) == 0x3C00, "one, overflowing sum");
  CHECK(bits_of(keep_finite<Float16>(1.0f, 65519.0f)) == 0x7BFF, "rounds to the largest");
  CHECK(bits_of(keep_finite<Float16>(1.0f, 65520.0f)) == 0x3C00, "rounds to infinity");
  CHECK(bits_of(keep_finite<Float16>(1e6f, 2e6f)) == 0x7C00, "the weight does not fit");
  CHECK(bits_of(keep_finite<Float16>(1e6f, 3.0f)) == 0x4200, "the sum fits");
  CHECK(bits_of(keep_finite<BFloat16>(2.0f, 0x1.FFp127f)) == 0x4000, "rounds to infinity");
  CHECK(bits_of(keep_finite<BFloat16>(2.0f, 0x1.FEFFFEp127f)) == 0x7F7F, "rounds to the largest");
  CHECK(bits_of(keep_finite<BFloat16>(-INFINITY, 0.0f + NAN)) == 0xFF80, "infinity is kept");
  const uint16_t nan = keep_finite<BFloat16>(float_of_bits(0x7F800001u), NAN).bits;
  CHECK(std::isnan(value_of(nan, kBFloat16Format)), "a NaN stays one in a cast: %04x", nan);
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::printf("usage: %s philox_kat.txt\n", argv[0]);
    return 2;
  }
  test_published_vectors(argv[1]);
  test_rows_equal_the_generator();
  test_uniforms();
  test_format<BFloat16>(kBFloat16Format, "bfloat16");
  test_format<Float16>(kFloat16Format, "float16");
  test_perturbed_value();
  test_keep_finite<float>(0x7F800000u, 0x80000000u, "float32");
  test_keep_finite<BFloat16>(0x7F80u, 0x8000u, "bfloat16");
  test_keep_finite<Float16>(0x7C00u, 0x8000u, "float16");
  test_keep_finite_in_a_cast();
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// What the C++ tests share: failures that print and count, and matrices between guards.
#pragma once

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/numeric.h"

namespace check {

using flatkern::BFloat16;
using flatkern::Dtype;
using flatkern::Float16;

inline int failures = 0;

#define CHECK(condition, ...)                                       \
  do {                                                              \
    if (!(condition)) {                                             \
      if (++check::failures <= 20) {                                \
        std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::printf(__VA_ARGS__);                                   \
        std::printf("\n");                                          \
      }                                                             \
    }                                                               \
  } while (0)

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
inline const char* name_of(Dtype d) {
  return d == Dtype::kFloat32 ? "float32" : d == Dtype::kBFloat16 ? "bfloat16" : "float16";
}
inline int64_t size_of(Dtype d) { return d == Dtype::kFloat32 ? 4 : 2; }

inline uint32_t load_bits(const void* p, Dtype d) {
  uint32_t bits = 0;
  memcpy(&bits, p, size_of(d));
  return bits;
}
inline float value_of(uint32_t bits, Dtype d) {
  if (d == Dtype::kFloat32) return flatkern::float_of_bits(bits);
  const uint16_t half = static_cast<uint16_t>(bits);
  return d == Dtype::kBFloat16 ? to_float(BFloat16{half}) : to_float(Float16{half});
}
inline uint32_t rounded(float value, Dtype d) {
  if (d == Dtype::kFloat32) return flatkern::bits_of_float(value);
  return d == Dtype::kBFloat16 ? flatkern::round_to<BFloat16>(value).bits
                               : flatkern::round_to<Float16>(value).bits;
}

// Memory that ends within 16 bytes of a page that may not be touched, at `shift` from a multiple
// of 16; what lies around the bytes is checked when they are given up. `sparse` memory is neither
// filled nor checked, and costs only the pages that are touched.
class Guarded {
 public:
  explicit Guarded(int64_t bytes, int64_t shift = 0, bool sparse = false)
      : bytes_(bytes), sparse_(sparse) {
    const int64_t inside = (bytes + 31 + kPage) / kPage * kPage;
    total_ = inside + kPage;
    base_ = static_cast<char*>(mmap(nullptr, total_, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) {
      std::perror("mmap");
      std::exit(1);
    }
    mprotect(base_ + inside, kPage, PROT_NONE);
    data_ = base_ + ((inside - bytes - shift) / 16 * 16 + shift);
    end_ = base_ + inside;
    if (!sparse) memset(base_, kFill, inside);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    if (!sparse_) {
      bool intact = true;
      for (char* p = base_; p < end_; ++p)
        intact &= (p >= data_ && p < data_ + bytes_) || *p == kFill;
      CHECK(intact, "bytes outside of a buffer were written");
    }
    munmap(base_, total_);
  }
  char* data() const { return data_; }

  static constexpr char kFill = 0x7B;  // 1.3e36 as float32 and bfloat16, 61000 as float16

 private:
  static constexpr int64_t kPage = 4096;
  int64_t bytes_, total_;
  bool sparse_;
  char *base_, *data_, *end_;
};

// Rows of a dtype with a stride, the first `shift` elements from a multiple of 16 bytes.
struct Matrix {
  Dtype dtype;
  int64_t rows, cols, stride;
  Guarded memory;

  Matrix(Dtype dtype, int64_t rows, int64_t cols, int64_t padding = 0, int shift = 0,
         bool sparse = false)
      : dtype(dtype),
        rows(rows),
        cols(cols),
        stride(cols + padding),
        memory(((rows - 1) * stride + cols) * size_of(dtype), shift * size_of(dtype), sparse),
        sparse_(sparse) {}
  ~Matrix() {
    bool intact = true;
    for (int64_t i = 0; !sparse_ && i + 1 < rows; ++i) {
      for (const char* p = at(i, cols); p < at(i + 1, 0); ++p) intact &= *p == Guarded::kFill;
    }
    CHECK(intact, "bytes between rows were written");
  }
  char* at(int64_t i, int64_t j) const { return memory.data() + (i * stride + j) * size_of(dtype); }
  uint32_t bits(int64_t i, int64_t j) const { return load_bits(at(i, j), dtype); }
  float value(int64_t i, int64_t j) const { return value_of(bits(i, j), dtype); }
  void set(int64_t i, int64_t j, uint32_t bits) { memcpy(at(i, j), &bits, size_of(dtype)); }
  void copy_from(const Matrix& other) {
    for (int64_t i = 0; i < rows; ++i) memcpy(at(i, 0), other.at(i, 0), cols * size_of(dtype));
  }
  bool same_bits(const Matrix& other) const {
    bool same = true;
    for (int64_t i = 0; i < rows; ++i) {
      same &= memcmp(at(i, 0), other.at(i, 0), cols * size_of(dtype)) == 0;
    }
    return same;
  }
  // Normal numbers, or any bits: NaN, infinities and denormals among them.
  void fill(bool wild, uint32_t seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        set(i, j, wild ? generator() : rounded(normal(generator), dtype));
      }
    }
  }

 private:
  bool sparse_;
};

}  // namespace check

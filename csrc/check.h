// Argument checks in C++, with the texts of flatkern/ops/_check.py: each names the argument, what
// it was and what is accepted.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <optional>
#include <string>

namespace flatkern::check {

inline std::string list(at::IntArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::string describe(const at::Tensor& t) {
  return std::string(c10::getDtypeNames(t.scalar_type()).first) + " " + list(t.sizes()) + " on " +
         t.device().str();
}

[[noreturn]] inline void refuse(const char* op, const char* argument, const std::string& accepted,
                                const std::string& got) {
  TORCH_CHECK_VALUE(false, op, ": ", argument, " must be ", accepted, ", got ", got);
}

[[noreturn]] inline void refuse(const char* op, const char* argument, const std::string& accepted,
                                const at::Tensor& got) {
  refuse(op, argument, accepted, describe(got));
}

inline bool is_floating(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kDouble;
}

// A weight [m, n] that the kernels serve.
inline void weight(const char* op, const at::Tensor& t) {
  const at::ScalarType dtype = t.scalar_type();
  if (t.dim() != 2) refuse(op, "weight", "2-D", t);
  if (!is_floating(dtype) || dtype == at::kDouble)
    refuse(op, "weight", "float32, bfloat16 or float16", t);
  if (t.layout() != at::kStrided) refuse(op, "weight", "dense", t);
  const int64_t rows = t.size(0), cols = t.size(1);
  if ((cols > 1 && t.stride(1) != 1) || (rows > 1 && t.stride(0) < cols))
    TORCH_CHECK_VALUE(false, op,
                      ": weight must have unit column stride and rows that do not overlap, got ",
                      describe(t), " with strides ", list(t.strides()));
}

inline void row_scale(const char* op, const at::Tensor& t, const at::Tensor& weight) {
  const bool right = t.scalar_type() == at::kFloat && t.dim() == 1 && t.size(0) == weight.size(0) &&
                     t.device() == weight.device() && t.layout() == at::kStrided;
  if (!right || (t.size(0) > 1 && t.stride(0) != 1))
    refuse(
        op, "row_scale",
        "contiguous float32 [" + std::to_string(weight.size(0)) + "] on " + weight.device().str(),
        t);
}

inline void key(const char* op, const at::Tensor& t, const at::Tensor& weight) {
  if (t.scalar_type() != at::kLong || t.dim() != 1 || t.size(0) != 4)
    refuse(op, "key", "int64 [4], as NoiseKey(...).to(device) makes it", t);
  if (t.device() != weight.device())
    refuse(op, "key", "on the weight's device " + weight.device().str(), t);
}

// Global coordinates must fit the counter: rows < 2^32, columns < 2^34.
inline void offset(const char* op, const char* name, const char* size_name, int64_t offset,
                   int64_t size, int64_t limit) {
  if (offset < 0) refuse(op, name, "at least 0", "int " + std::to_string(offset));
  TORCH_CHECK_VALUE(size <= limit - offset, op, ": ", name, " + ", size_name, " must be at most ",
                    limit, ", got ", offset, " + ", size);
}

inline void offsets(const char* op, const at::Tensor& weight, int64_t row_offset,
                    int64_t col_offset) {
  offset(op, "row_offset", "rows", row_offset, weight.size(0), int64_t{1} << 32);
  offset(op, "col_offset", "cols", col_offset, weight.size(1), int64_t{1} << 34);
}

inline void finite(const char* op, const char* argument, double value) {
  if (std::isfinite(value)) return;
  refuse(op, argument, "finite",
         std::string("float ") + (std::isnan(value) ? "nan"
                                  : value > 0       ? "inf"
                                                    : "-inf"));
}

// lora_A [r, n] and lora_B [m, r], both or neither.
inline void adapters(const char* op, const std::optional<at::Tensor>& lora_A,
                     const std::optional<at::Tensor>& lora_B, const at::Tensor& weight) {
  if (!lora_A && !lora_B) return;
  const char* names[] = {"lora_A", "lora_B"};
  if (!lora_A || !lora_B)
    TORCH_CHECK_VALUE(false, op, ": ", names[lora_A ? 1 : 0], " must be given together with ",
                      names[lora_A ? 0 : 1], ", got None");
  const std::string rows = std::to_string(weight.size(0)), cols = std::to_string(weight.size(1));
  if (!is_floating(lora_A->scalar_type()) || lora_A->dim() != 2 ||
      lora_A->size(1) != weight.size(1))
    refuse(op, "lora_A", "floating [r, " + cols + "]", *lora_A);
  if (!is_floating(lora_B->scalar_type()) || lora_B->dim() != 2 ||
      lora_B->size(0) != weight.size(0) || lora_B->size(1) != lora_A->size(0))
    refuse(op, "lora_B", "floating [" + rows + ", " + std::to_string(lora_A->size(0)) + "]",
           *lora_B);
  for (int i = 0; i < 2; ++i) {
    const at::Tensor& t = i ? *lora_B : *lora_A;
    if (t.device() != weight.device())
      refuse(op, names[i], "on the weight's device " + weight.device().str(), t);
  }
}

}  // namespace flatkern::check

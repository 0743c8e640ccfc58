// The CPU kernels as torch ops: the checks that guard memory, threading, registration. Schemas are
// defined in Python (flatkern/ops), which also explains errors to users.
#include <ATen/ATen.h>
#include <torch/csrc/stable/ops.h>
#include <torch/library.h>

#include "kernels.h"

namespace flatkern::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Fewer elements than this are not worth another thread.
constexpr int64_t kGrainElements = 32768;

Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK(false, "flatkern_cpu: expected float32, bfloat16 or float16, got ",
                  t.scalar_type());
  }
}

void check_matrix(const at::Tensor& t) {
  TORCH_CHECK(t.device().is_cpu() && t.dim() == 2, "flatkern_cpu: expected a CPU matrix");
  TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, "flatkern_cpu: columns must be adjacent");
  TORCH_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), "flatkern_cpu: rows must not overlap");
}

NoiseKey key_of(const at::Tensor& key) {
  TORCH_CHECK(key.device().is_cpu() && key.scalar_type() == at::kLong && key.numel() == 4,
              "flatkern_cpu: key must be int64 [4]");
  const at::Tensor words = key.contiguous();
  const int64_t* w = words.const_data_ptr<int64_t>();
  return {static_cast<uint32_t>(w[0]), static_cast<uint32_t>(w[1]), static_cast<uint32_t>(w[2]),
          static_cast<uint32_t>(w[3])};
}

Window window_of(const at::Tensor& key, int64_t rows, int64_t cols, int64_t row_offset,
                 int64_t col_offset) {
  TORCH_CHECK(rows >= 0 && cols >= 0 && row_offset >= 0 && col_offset >= 0,
              "flatkern_cpu: sizes and offsets must not be negative");
  return {key_of(key), rows, cols, static_cast<uint64_t>(row_offset),
          static_cast<uint64_t>(col_offset)};
}

// torch's own thread pool, without compiling against its OpenMP.
template <class F>
void parallel_for(int64_t units, int64_t elements_per_unit, const F& f) {
  const int64_t grain =
      std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_unit));
  torch::stable::parallel_for(0, units, grain, f);
}

template <class F>
void for_blocks(const Window& w, const F& f) {
  parallel_for(w.rows * blocks_per_row(w.cols), std::min(w.cols, kBlockCols), f);
}

at::Tensor philox_bits(int64_t rows, int64_t cols, const at::Tensor& key, int64_t row_offset,
                       int64_t col_offset) {
  const Window window = window_of(key, rows, cols, row_offset, col_offset);
  at::Tensor out = at::empty({rows, cols}, key.options());
  const NoiseArgs args{window, out.mutable_data_ptr()};
  for_blocks(window, [&](int64_t begin, int64_t end) { kernels().philox_bits(args, begin, end); });
  return out;
}

at::Tensor noise(int64_t rows, int64_t cols, const at::Tensor& key, int64_t row_offset,
                 int64_t col_offset) {
  const Window window = window_of(key, rows, cols, row_offset, col_offset);
  at::Tensor out = at::empty({rows, cols}, key.options().dtype(at::kFloat));
  const NoiseArgs args{window, out.mutable_data_ptr()};
  for_blocks(window, [&](int64_t begin, int64_t end) { kernels().noise(args, begin, end); });
  return out;
}

PerturbArgs perturb_args(const at::Tensor& weight, const at::Tensor& out, const at::Tensor& key,
                         bool elementwise, int64_t row_offset, int64_t col_offset) {
  check_matrix(weight);
  check_matrix(out);
  TORCH_CHECK(weight.sizes() == out.sizes(), "flatkern_cpu: out must have the weight's shape");
  return {window_of(key, weight.size(0), weight.size(1), row_offset, col_offset),
          weight.const_data_ptr(),
          out.mutable_data_ptr(),
          dtype_of(weight),
          dtype_of(out),
          weight.stride(0),
          out.stride(0),
          nullptr,
          elementwise};
}

using RangeKernel = void (*)(const PerturbArgs&, int64_t, int64_t);

void run_perturb(RangeKernel run, const at::Tensor& weight, const at::Tensor& row_scale,
                 const at::Tensor& key, bool elementwise, int64_t row_offset, int64_t col_offset,
                 const at::Tensor& out) {
  PerturbArgs args = perturb_args(weight, out, key, elementwise, row_offset, col_offset);
  TORCH_CHECK(row_scale.device().is_cpu() && row_scale.scalar_type() == at::kFloat &&
                  row_scale.is_contiguous() && row_scale.numel() == weight.size(0),
              "flatkern_cpu: row_scale must be contiguous float32 [rows]");
  args.row_scale = row_scale.const_data_ptr<float>();
  for_blocks(args.window, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

void perturb_out(const at::Tensor& weight, const at::Tensor& row_scale, const at::Tensor& key,
                 bool elementwise, int64_t row_offset, int64_t col_offset, at::Tensor& out) {
  run_perturb(kernels().perturb, weight, row_scale, key, elementwise, row_offset, col_offset, out);
}

at::Tensor perturb(const at::Tensor& weight, const at::Tensor& row_scale, const at::Tensor& key,
                   bool elementwise, std::optional<at::ScalarType> dtype, int64_t row_offset,
                   int64_t col_offset) {
  at::Tensor out =
      at::empty(weight.sizes(), weight.options().dtype(dtype.value_or(weight.scalar_type())));
  perturb_out(weight, row_scale, key, elementwise, row_offset, col_offset, out);
  return out;
}

void check_no_residual(const OptionalTensor& residual) {
  TORCH_CHECK(!residual.has_value(), "flatkern_cpu: residual must be None");
}

void perturb_(at::Tensor& weight, const at::Tensor& row_scale, const at::Tensor& key,
              bool elementwise, const OptionalTensor& residual, int64_t row_offset,
              int64_t col_offset) {
  check_no_residual(residual);
  perturb_out(weight, row_scale, key, elementwise, row_offset, col_offset, weight);
}

void restore_(at::Tensor& weight, const at::Tensor& row_scale, const at::Tensor& key,
              bool elementwise, const OptionalTensor& residual, int64_t row_offset,
              int64_t col_offset) {
  check_no_residual(residual);
  run_perturb(kernels().restore, weight, row_scale, key, elementwise, row_offset, col_offset,
              weight);
}

// The adapters as the row norm reads them: float32, B times scaling, A padded with zeros. They
// are small; the arguments hold pointers into them.
struct Adapters {
  at::Tensor lora_A, lora_B;
};

Adapters prepare_adapters(const at::Tensor& weight, const OptionalTensor& lora_A,
                          const OptionalTensor& lora_B, double scaling) {
  if (!lora_A.has_value() || !lora_B.has_value()) return {};
  TORCH_CHECK(lora_A->dim() == 2 && lora_B->dim() == 2 && lora_A->size(1) == weight.size(1) &&
                  lora_B->size(0) == weight.size(0) && lora_A->size(0) == lora_B->size(1),
              "flatkern_cpu: lora_A must be [r, n] and lora_B [m, r]");
  const int64_t padding = (kNormLanes - weight.size(1) % kNormLanes) % kNormLanes;
  at::Tensor padded = lora_A->to(at::kFloat);
  if (padding != 0) padded = at::constant_pad_nd(padded, {0, padding});
  return {padded.contiguous(), (lora_B->to(at::kFloat) * scaling).contiguous()};
}

RowNormArgs row_norm_args(const at::Tensor& weight, const Adapters& adapters,
                          const at::Tensor& norm) {
  check_matrix(weight);
  RowNormArgs args{weight.size(0),
                   weight.size(1),
                   0,
                   weight.const_data_ptr(),
                   dtype_of(weight),
                   weight.stride(0),
                   nullptr,
                   0,
                   nullptr,
                   norm.mutable_data_ptr<float>()};
  if (adapters.lora_A.defined()) {
    args.rank = adapters.lora_A.size(0);
    args.lora_A = adapters.lora_A.const_data_ptr<float>();
    args.lora_A_stride = adapters.lora_A.size(1);
    args.lora_B = adapters.lora_B.const_data_ptr<float>();
  }
  return args;
}

at::Tensor row_norm(const at::Tensor& weight, const OptionalTensor& lora_A,
                    const OptionalTensor& lora_B, double scaling) {
  const Adapters adapters = prepare_adapters(weight, lora_A, lora_B, scaling);
  at::Tensor norm = at::empty({weight.size(0)}, weight.options().dtype(at::kFloat));
  const RowNormArgs args = row_norm_args(weight, adapters, norm);
  parallel_for(args.rows, args.cols * (1 + args.rank),
               [&](int64_t begin, int64_t end) { kernels().row_norm(args, begin, end); });
  return norm;
}

at::Tensor perturb_merged_(at::Tensor& weight, const OptionalTensor& lora_A,
                           const OptionalTensor& lora_B, double scaling, double sigma,
                           const at::Tensor& key, bool elementwise, const OptionalTensor& residual,
                           int64_t row_offset) {
  check_no_residual(residual);
  const Adapters adapters = prepare_adapters(weight, lora_A, lora_B, scaling);
  at::Tensor row_scale = at::empty({weight.size(0)}, weight.options().dtype(at::kFloat));
  const double columns = static_cast<double>(std::max<int64_t>(weight.size(1), 1));
  const PerturbMergedArgs args{perturb_args(weight, weight, key, elementwise, row_offset, 0),
                               row_norm_args(weight, adapters, row_scale),
                               static_cast<float>(sigma / std::sqrt(columns))};
  parallel_for(weight.size(0), weight.size(1),
               [&](int64_t begin, int64_t end) { kernels().perturb_merged(args, begin, end); });
  return row_scale;
}

}  // namespace

TORCH_LIBRARY_IMPL(flatkern_cpu, CPU, m) {
  m.impl("philox_bits", philox_bits);
  m.impl("noise", noise);
  m.impl("row_norm", row_norm);
  m.impl("perturb", perturb);
  m.impl("perturb.out", perturb_out);
  m.impl("perturb_", perturb_);
  m.impl("restore_", restore_);
  m.impl("perturb_merged_", perturb_merged_);
}

}  // namespace flatkern::cpu

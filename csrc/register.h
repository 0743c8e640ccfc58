// The ops of a native backend: the checks that guard memory, and the tensors that its kernels
// take. Schemas are defined in Python (flatkern/ops), which also explains errors to users.
//
// Included by the backends' register.cpp, after torch's headers. `Backend` has the types of its
// kernels' arguments, says where a key's words lie, and runs its kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "noisy_linear.h"
#include "residual.h"

namespace flatkern {

using OptionalTensor = std::optional<at::Tensor>;

// Where a residual's parts lie.
struct ResidualParts {
  ResidualHeader* header;
  uint32_t *directory, *pool;
  uint64_t capacity;  // words
};

inline ResidualParts parts_of(const at::Tensor& residual, const Chunks& chunks) {
  const int64_t pool = kResidualHeader + chunks.directory_bytes();
  auto* bytes = static_cast<uint8_t*>(residual.mutable_data_ptr());
  TORCH_CHECK(residual.scalar_type() == at::kByte && residual.is_contiguous() &&
                  residual.numel() >= pool && reinterpret_cast<uintptr_t>(bytes) % 16 == 0,
              "flatkern: residual must be aligned uint8 of the weight's size or more");
  return {reinterpret_cast<ResidualHeader*>(bytes),
          reinterpret_cast<uint32_t*>(bytes + kResidualHeader),
          reinterpret_cast<uint32_t*>(bytes + pool),
          static_cast<uint64_t>(residual.numel() - pool) / 4};
}

// A hash (FNV-1a) of all that may move a bit of the noise or of the brackets.
inline uint64_t implementation_of(const std::string& parts) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const unsigned char c : std::to_string(kNoiseVersion) + FLATKERN_TORCH_VERSION + parts) {
    hash = (hash ^ c) * 0x100000001B3u;
  }
  return hash;
}

template <class Backend>
struct Ops {
  using Block = typename Backend::Block;
  using NoiseArgs = typename Backend::NoiseArgs;
  using PerturbArgs = typename Backend::PerturbArgs;
  using PlaneArgs = typename Backend::PlaneArgs;
  using RowNormArgs = typename Backend::RowNormArgs;

  static Dtype dtype_of(const at::Tensor& t) {
    switch (t.scalar_type()) {
      case at::kFloat:
        return Dtype::kFloat32;
      case at::kBFloat16:
        return Dtype::kBFloat16;
      case at::kHalf:
        return Dtype::kFloat16;
      default:
        TORCH_CHECK(false, Backend::kName, ": expected float32, bfloat16 or float16, got ",
                    t.scalar_type());
    }
  }

  static void check_matrix(const at::Tensor& t) {
    TORCH_CHECK(t.device().type() == Backend::kDevice && t.dim() == 2, Backend::kName,
                ": expected a matrix on this backend's device");
    TORCH_CHECK(t.numel() == 0 || t.const_data_ptr() != nullptr, Backend::kName,
                ": the memory of a tensor was freed");
    TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, Backend::kName, ": columns must be adjacent");
    TORCH_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), Backend::kName,
                ": rows must not overlap");
  }

  static void check_one_device(const at::Tensor& t, const at::Tensor& first) {
    TORCH_CHECK(t.device() == first.device(), Backend::kName,
                ": all tensors must be on one device");
  }

  // The key's four words in a row; the caller keeps the tensor until its kernel is launched.
  static at::Tensor words_of(const at::Tensor& key) {
    TORCH_CHECK(key.device().type() == Backend::kDevice && key.scalar_type() == at::kLong &&
                    key.numel() == 4,
                Backend::kName, ": key must be int64 [4]");
    return key.contiguous();
  }

  static Block block_of(const at::Tensor& words, int64_t rows, int64_t cols, int64_t row_offset,
                        int64_t col_offset) {
    TORCH_CHECK(rows >= 0 && cols >= 0 && row_offset >= 0 && col_offset >= 0, Backend::kName,
                ": sizes and offsets must not be negative");
    return {Backend::key_of(words.const_data_ptr<int64_t>()), rows, cols,
            static_cast<uint64_t>(row_offset), static_cast<uint64_t>(col_offset)};
  }

  static at::Tensor philox_bits(int64_t rows, int64_t cols, const at::Tensor& key,
                                int64_t row_offset, int64_t col_offset) {
    const at::Tensor words = words_of(key);
    const Block block = block_of(words, rows, cols, row_offset, col_offset);
    at::Tensor out = at::empty({rows, cols}, key.options());
    Backend::philox_bits(out, NoiseArgs{block, out.mutable_data_ptr()});
    return out;
  }

  static at::Tensor noise(int64_t rows, int64_t cols, const at::Tensor& key, int64_t row_offset,
                          int64_t col_offset) {
    const at::Tensor words = words_of(key);
    const Block block = block_of(words, rows, cols, row_offset, col_offset);
    at::Tensor out = at::empty({rows, cols}, key.options().dtype(at::kFloat));
    Backend::noise(out, NoiseArgs{block, out.mutable_data_ptr()});
    return out;
  }

  static at::Tensor uniform(int64_t rows, int64_t cols, const at::Tensor& key, int64_t row_offset,
                            int64_t col_offset) {
    const at::Tensor words = words_of(key);
    const Block block = block_of(words, rows, cols, row_offset, col_offset);
    at::Tensor out = at::empty({rows, cols}, key.options().dtype(at::kFloat));
    Backend::uniform(out, NoiseArgs{block, out.mutable_data_ptr()});
    return out;
  }

  static PerturbArgs perturb_args(const at::Tensor& weight, const at::Tensor& out,
                                  const at::Tensor& words, const at::Tensor& row_scale,
                                  bool elementwise, int64_t row_offset, int64_t col_offset) {
    check_matrix(weight);
    check_matrix(out);
    TORCH_CHECK(weight.sizes() == out.sizes(), Backend::kName,
                ": out must have the weight's shape");
    TORCH_CHECK(out.device() == weight.device() && row_scale.device() == weight.device() &&
                    words.device() == weight.device(),
                Backend::kName, ": all tensors must be on one device");
    TORCH_CHECK(row_scale.scalar_type() == at::kFloat && row_scale.is_contiguous() &&
                    row_scale.numel() == weight.size(0),
                Backend::kName, ": row_scale must be contiguous float32 [rows]");
    return {block_of(words, weight.size(0), weight.size(1), row_offset, col_offset),
            weight.const_data_ptr(),
            out.mutable_data_ptr(),
            dtype_of(weight),
            dtype_of(out),
            weight.stride(0),
            out.stride(0),
            row_scale.const_data_ptr<float>(),
            elementwise};
  }

  static void perturb_out(const at::Tensor& weight, const at::Tensor& row_scale,
                          const at::Tensor& key, bool elementwise, int64_t row_offset,
                          int64_t col_offset, at::Tensor& out) {
    const at::Tensor words = words_of(key);
    Backend::perturb(
        out, {perturb_args(weight, out, words, row_scale, elementwise, row_offset, col_offset)});
  }

  static at::Tensor perturb(const at::Tensor& weight, const at::Tensor& row_scale,
                            const at::Tensor& key, bool elementwise,
                            std::optional<at::ScalarType> dtype, int64_t row_offset,
                            int64_t col_offset) {
    at::Tensor out =
        at::empty(weight.sizes(), weight.options().dtype(dtype.value_or(weight.scalar_type())));
    perturb_out(weight, row_scale, key, elementwise, row_offset, col_offset, out);
    return out;
  }

  static void perturb_panel(const NoisyPanel& panel, const at::Tensor& out) {
    check_matrix(panel.weight);
    TORCH_CHECK(out.is_contiguous() && out.numel() >= panel.rows * panel.cols, Backend::kName,
                ": out must be dense and of the panel's size");
    const int64_t first = panel.row * panel.weight.stride(0) + panel.col;
    const auto* bytes = static_cast<const uint8_t*>(panel.weight.const_data_ptr());
    Backend::perturb(out,
                     {{block_of(panel.words, panel.rows, panel.cols, panel.row_offset + panel.row,
                                panel.col_offset + panel.col),
                       bytes + first * panel.weight.element_size(), out.mutable_data_ptr(),
                       dtype_of(panel.weight), dtype_of(out), panel.weight.stride(0), panel.cols,
                       panel.row_scale.const_data_ptr<float>() + panel.row, panel.elementwise}});
  }

  static void perturb_plane(const at::Tensor& weight, const at::Tensor& row_scales,
                            const at::Tensor& keys, int64_t row_offset, int64_t col_offset,
                            at::Tensor& out) {
    TORCH_CHECK(keys.dim() == 2 && keys.size(0) == 2 && row_scales.dim() == 2 &&
                    row_scales.size(0) == 2 && row_scales.is_contiguous() &&
                    out.scalar_type() == weight.scalar_type(),
                Backend::kName, ": row_scales must be [2, rows], keys [2, 4], and out alike");
    const at::Tensor words[] = {words_of(keys.select(0, 0)), words_of(keys.select(0, 1))};
    const at::Tensor scales[] = {row_scales.select(0, 0), row_scales.select(0, 1)};
    const PerturbArgs first =
        perturb_args(weight, out, words[0], scales[0], false, row_offset, col_offset);
    Backend::perturb_plane(out,
                           PlaneArgs{first, Backend::key_of(words[1].const_data_ptr<int64_t>()),
                                     scales[1].const_data_ptr<float>()});
  }

  // Whether two of the tensors may share memory that is written: then they are written one after
  // the other.
  static bool overlap(const std::vector<PerturbArgs>& tensors, at::TensorList residuals) {
    std::vector<std::pair<uintptr_t, uintptr_t>> extents;
    for (const PerturbArgs& args : tensors) {
      const int64_t rows = args.block.rows, cols = args.block.cols;
      if (rows == 0 || cols == 0) continue;
      const int64_t bytes = args.out_dtype == Dtype::kFloat32 ? 4 : 2;
      const auto begin = reinterpret_cast<uintptr_t>(args.out);
      extents.emplace_back(begin, begin + ((rows - 1) * args.out_stride + cols) * bytes);
    }
    for (const at::Tensor& residual : residuals) {
      const auto begin = reinterpret_cast<uintptr_t>(residual.const_data_ptr());
      extents.emplace_back(begin, begin + residual.nbytes());
    }
    std::sort(extents.begin(), extents.end());
    for (size_t i = 1; i < extents.size(); ++i) {
      if (extents[i].first < extents[i - 1].second) return true;
    }
    return false;
  }

  // Tensors on one device that share no memory; a residual for each, or none at all.
  template <bool Restores>
  static void run_inplace(const at::Tensor& on, const std::vector<PerturbArgs>& tensors,
                          at::TensorList residuals) {
    if (residuals.empty()) return (Restores ? Backend::restore : Backend::perturb)(on, tensors);
    (Restores ? Backend::restore_residual : Backend::perturb_residual)(tensors, residuals);
  }

  template <bool Restores>
  static void foreach_inplace(at::TensorList weights, at::TensorList row_scales,
                              at::TensorList keys, bool elementwise, at::TensorList residuals,
                              at::IntArrayRef row_offsets, at::IntArrayRef col_offsets) {
    const size_t count = weights.size();
    TORCH_CHECK(row_scales.size() == count && keys.size() == count &&
                    (residuals.empty() || residuals.size() == count) &&
                    row_offsets.size() == count && col_offsets.size() == count,
                Backend::kName, ": lists must be of one length");
    if (count == 0) return;
    std::vector<at::Tensor> words;
    std::vector<PerturbArgs> tensors;
    for (size_t i = 0; i < count; ++i) {
      check_one_device(weights[i], weights[0]);
      words.push_back(words_of(keys[i]));
      tensors.push_back(perturb_args(weights[i], weights[i], words[i], row_scales[i], elementwise,
                                     row_offsets[i], col_offsets[i]));
    }
    for (const at::Tensor& residual : residuals) check_one_device(residual, weights[0]);
    if (!residuals.empty() && !Backend::template admits<Restores>(tensors, residuals)) return;
    if (!overlap(tensors, residuals)) return run_inplace<Restores>(weights[0], tensors, residuals);
    for (size_t i = 0; i < count; ++i) {
      run_inplace<Restores>(weights[0], {tensors[i]},
                            residuals.empty() ? residuals : residuals.slice(i, 1));
    }
  }

  template <bool Restores>
  static void inplace(at::Tensor& weight, const at::Tensor& row_scale, const at::Tensor& key,
                      bool elementwise, const OptionalTensor& residual, int64_t row_offset,
                      int64_t col_offset) {
    foreach_inplace<Restores>(weight, row_scale, key, elementwise,
                              residual ? at::TensorList(*residual) : at::TensorList(), row_offset,
                              col_offset);
  }

  // The adapters as the backend's row norm reads them; the arguments hold pointers into them.
  using Adapters = typename Backend::Adapters;

  static void check_adapters(const at::Tensor& weight, const at::Tensor& lora_A,
                             const at::Tensor& lora_B) {
    TORCH_CHECK(weight.dim() == 2 && lora_A.dim() == 2 && lora_B.dim() == 2 &&
                    lora_A.size(1) == weight.size(1) && lora_B.size(0) == weight.size(0) &&
                    lora_A.size(0) == lora_B.size(1),
                Backend::kName, ": lora_A must be [r, n] and lora_B [m, r]");
    TORCH_CHECK(lora_A.device() == weight.device() && lora_B.device() == weight.device(),
                Backend::kName, ": adapters must be on the weight's device");
  }

  static std::vector<Adapters> prepare_all(at::TensorList weights, at::TensorList lora_As,
                                           at::TensorList lora_Bs, at::ArrayRef<double> scalings) {
    if (lora_As.empty()) return std::vector<Adapters>(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) check_adapters(weights[i], lora_As[i], lora_Bs[i]);
    return Backend::adapters(lora_As, lora_Bs, scalings);
  }

  // Of one.
  static Adapters prepare_adapters(const at::Tensor& weight, const OptionalTensor& lora_A,
                                   const OptionalTensor& lora_B, double scaling) {
    if (!lora_A.has_value() || !lora_B.has_value()) return {};
    return prepare_all(weight, *lora_A, *lora_B, scaling)[0];
  }

  // `norm` times `factor` is written.
  static RowNormArgs row_norm_args(const at::Tensor& weight, const Adapters& adapters,
                                   const at::Tensor& norm, double factor) {
    check_matrix(weight);
    TORCH_CHECK(norm.scalar_type() == at::kFloat && norm.is_contiguous() &&
                    norm.numel() == weight.size(0) && norm.device() == weight.device(),
                Backend::kName, ": norms must be contiguous float32 [rows] on the weight's device");
    RowNormArgs args{};
    args.relative_scale = static_cast<float>(factor);
    args.rows = weight.size(0);
    args.cols = weight.size(1);
    args.weight = weight.const_data_ptr();
    args.weight_dtype = dtype_of(weight);
    args.weight_stride = weight.stride(0);
    if (adapters.lora_A.defined()) {
      args.rank = adapters.lora_A.size(0);
      Backend::set_adapters(args, adapters);
    }
    args.norm = norm.mutable_data_ptr<float>();
    return args;
  }

  static at::Tensor row_norm(const at::Tensor& weight, const OptionalTensor& lora_A,
                             const OptionalTensor& lora_B, double scaling) {
    const Adapters adapters = prepare_adapters(weight, lora_A, lora_B, scaling);
    at::Tensor norm = at::empty({weight.size(0)}, weight.options().dtype(at::kFloat));
    Backend::row_norm(norm, {row_norm_args(weight, adapters, norm, 1.0)});
    return norm;
  }

  // All tensors on one device: row_scales[i] = factors[i] ||(W + s B A)_rows||.
  static void foreach_row_scale_(at::TensorList row_scales, at::TensorList weights,
                                 at::TensorList lora_As, at::TensorList lora_Bs,
                                 at::ArrayRef<double> scalings, at::ArrayRef<double> factors) {
    const size_t count = weights.size();
    TORCH_CHECK(row_scales.size() == count && scalings.size() == count && factors.size() == count &&
                    lora_As.size() == lora_Bs.size() &&
                    (lora_As.empty() || lora_As.size() == count),
                Backend::kName, ": lists must be of one length");
    if (count == 0) return;
    for (const at::Tensor& weight : weights) check_one_device(weight, weights[0]);
    const std::vector<Adapters> adapters = prepare_all(weights, lora_As, lora_Bs, scalings);
    std::vector<RowNormArgs> tensors;
    for (size_t i = 0; i < count; ++i) {
      tensors.push_back(row_norm_args(weights[i], adapters[i], row_scales[i], factors[i]));
    }
    Backend::row_norm(row_scales[0], tensors);
  }

  static at::Tensor perturb_merged_(at::Tensor& weight, const OptionalTensor& lora_A,
                                    const OptionalTensor& lora_B, double scaling, double sigma,
                                    const at::Tensor& key, bool elementwise,
                                    const OptionalTensor& residual, int64_t row_offset) {
    // With a residual, flatkern/ops runs row_norm and perturb_.
    TORCH_CHECK(!residual.has_value(), Backend::kName, ": residual must be None");
    const at::Tensor words = words_of(key);
    const Adapters adapters = prepare_adapters(weight, lora_A, lora_B, scaling);
    at::Tensor row_scale = at::empty({weight.size(0)}, weight.options().dtype(at::kFloat));
    const double columns = static_cast<double>(std::max<int64_t>(weight.size(1), 1));
    Backend::perturb_merged(
        row_scale, perturb_args(weight, weight, words, row_scale, elementwise, row_offset, 0),
        row_norm_args(weight, adapters, row_scale, sigma / std::sqrt(columns)));
    return row_scale;
  }

  static void register_in(torch::Library& m) {
    m.impl("philox_bits", philox_bits);
    m.impl("noise", noise);
    m.impl("uniform", uniform);
    m.impl("row_norm", row_norm);
    m.impl("perturb", perturb);
    m.impl("perturb.out", perturb_out);
    m.impl("perturb_", inplace<false>);
    m.impl("restore_", inplace<true>);
    m.impl("perturb_merged_", perturb_merged_);
    m.impl("perturb_plane", perturb_plane);
    m.impl("foreach_row_scale_", foreach_row_scale_);
    m.impl("foreach_perturb_", foreach_inplace<false>);
    m.impl("foreach_restore_", foreach_inplace<true>);
  }
};

}  // namespace flatkern

// noisy_linear of the native backends as one autograd node: panels of noise, the vendor's product
// and the low-rank part, forward and backward, without Python in between.
// flatkern/ops/noisy_linear.py is the same in Python.
#include "noisy_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <bit>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "noisy_products.h"

namespace flatkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

constexpr const char* kOp = "noisy_linear";

struct NoisyLinearCpu;
struct NoisyLinearCuda;

struct Cpu {
  using Node = NoisyLinearCpu;
  static constexpr const char* kNoisyLinear = "flatkern_cpu::noisy_linear";
  static constexpr const char* kBackward = "flatkern_cpu::noisy_linear_backward";
  static constexpr auto perturb_panel = cpu::perturb_panel;
};

#ifdef FLATKERN_CUDA_VERSION
struct Cuda {
  using Node = NoisyLinearCuda;
  static constexpr const char* kNoisyLinear = "flatkern_cuda::noisy_linear";
  static constexpr const char* kBackward = "flatkern_cuda::noisy_linear_backward";
  static constexpr auto perturb_panel = cuda::perturb_panel;
};
#endif

template <class Backend>
NoisyWeight noisy_weight(const Tensor& weight, const Tensor& row_scale, const Tensor& key,
                         bool elementwise, OptionalDtype dtype, int64_t panel_bytes,
                         int64_t row_offset, int64_t col_offset) {
  check::weight(kOp, weight);
  check::row_scale(kOp, row_scale, weight);
  check::key(kOp, key, weight);
  check::offsets(kOp, weight, row_offset, col_offset);
  return {Backend::perturb_panel,
          weight,
          row_scale,
          key.contiguous(),
          elementwise,
          dtype.value_or(weight.scalar_type()),
          panel_bytes,
          row_offset,
          col_offset};
}

Adapters adapters_of(const Tensor& lora_A, const Tensor& lora_B, double scaling,
                     OptionalDtype dtype, int64_t block_bytes) {
  const at::ScalarType own = dtype.value_or(lora_A.scalar_type());
  return {lora_A.to(own), lora_B.to(own), scaling, block_bytes};
}

// Below autograd. Products are taken in the dtypes that they are given, so autocast is off.
template <class Backend>
Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
               const Tensor& row_scale, const Tensor& key, bool elementwise,
               OptionalDtype compute_dtype, int64_t panel_bytes, int64_t block_bytes,
               int64_t row_offset, int64_t col_offset) {
  const NoisyWeight noisy = noisy_weight<Backend>(
      weight, row_scale, key, elementwise, compute_dtype, panel_bytes, row_offset, col_offset);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  if (x.dim() == 0 || x.size(-1) != cols || !check::is_floating(x.scalar_type()))
    check::refuse(kOp, "x", "floating [..., " + std::to_string(cols) + "]", x);
  if (x.device() != weight.device())
    check::refuse(kOp, "x", "on the weight's device " + weight.device().str(), x);
  if (bias && (bias->dim() != 1 || bias->size(0) != rows || bias->device() != weight.device() ||
               !check::is_floating(bias->scalar_type())))
    check::refuse(
        kOp, "bias",
        "floating [" + std::to_string(rows) + "] on " + weight.device().str() + " or None", *bias);
  check::finite(kOp, "scaling", scaling);
  check::adapters(kOp, lora_A, lora_B, weight);

  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  // Adapters take x as it came, unless autocast rounds it for them as well.
  const Tensor x2 = flat(x), base_x = x2.to(noisy.dtype);
  const Tensor y = noisy.product(base_x, bias ? OptionalTensor(bias->to(noisy.dtype)) : bias);
  if (lora_A)
    adapters_of(*lora_A, *lora_B, scaling, compute_dtype, block_bytes)
        .add_product(y, compute_dtype ? base_x : x2);
  return shaped(y.to(x.scalar_type()), x.sizes(), rows);
}

// The gradients that are needed, of x, lora_A and lora_B in this order. x is not looked at, and
// may be missing, where lora_A and lora_B need none.
template <class Backend>
std::vector<Tensor> backward(const Tensor& grad, const OptionalTensor& x, const Tensor& weight,
                             const OptionalTensor& lora_A, const OptionalTensor& lora_B,
                             double scaling, const Tensor& row_scale, const Tensor& key,
                             bool need_x, bool need_A, bool need_B, bool elementwise,
                             OptionalDtype compute_dtype, int64_t panel_bytes, int64_t block_bytes,
                             int64_t row_offset, int64_t col_offset) {
  const NoisyWeight noisy = noisy_weight<Backend>(
      weight, row_scale, key, elementwise, compute_dtype, panel_bytes, row_offset, col_offset);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Tensor grad2 = flat(grad), grad_x, grad_A, grad_B;
  const Tensor base_grad = need_x || compute_dtype ? grad2.to(noisy.dtype) : Tensor();
  if (need_x) grad_x = noisy.product_transposed(base_grad);
  // Without gradients of its own a missing adapter still passes on that of x.
  if (lora_A && lora_B) {
    Tensor x2 = need_A || need_B ? flat(*x) : Tensor();
    if (compute_dtype) {
      grad2 = base_grad;
      if (x2.defined()) x2 = x2.to(noisy.dtype);
    }
    adapters_of(*lora_A, *lora_B, scaling, compute_dtype, block_bytes)
        .backward(grad2, x2, grad_x, need_A ? &grad_A : nullptr, need_B ? &grad_B : nullptr);
  }
  std::vector<Tensor> found;
  if (need_x) found.push_back(shaped(grad_x.to(grad.scalar_type()), grad.sizes(), weight.size(1)));
  if (need_A) found.push_back(grad_A.to(lora_A->scalar_type()));
  if (need_B) found.push_back(grad_B.to(lora_B->scalar_type()));
  return found;
}

// What a call has besides the tensors that may ask for a gradient.
struct Rest {
  double scaling;
  const Tensor &row_scale, &key;
  bool elementwise;
  OptionalDtype compute_dtype;
  int64_t panel_bytes, block_bytes, row_offset, col_offset;
};

template <class Backend>
struct Steps {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static Tensor call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
                     const Tensor& row_scale, const Tensor& key, bool elementwise,
                     OptionalDtype compute_dtype, int64_t panel_bytes, int64_t block_bytes,
                     int64_t row_offset, int64_t col_offset) {
    bool asked = false;
    const auto look = [&](const Tensor& t) {
      TORCH_CHECK(!t._fw_grad(0).defined(), kOp,
                  ": forward-mode derivatives are not supported; take them in reverse, or perturb "
                  "the weight in place");
      asked = asked || t.requires_grad();
    };
    look(x);
    look(weight);
    for (const OptionalTensor* t : {&bias, &lora_A, &lora_B}) {
      if (*t) look(**t);
    }
    const Rest rest{scaling,     row_scale,   key,        elementwise, compute_dtype,
                    panel_bytes, block_bytes, row_offset, col_offset};
    if (asked && at::GradMode::is_enabled())
      return Backend::Node::apply(x, weight, bias, lora_A, lora_B, rest);
    return below(x, weight, bias, lora_A, lora_B, rest);
  }

  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& lora_A,
                        const OptionalTensor& lora_B, const Rest& rest) {
    const auto asks = [](const OptionalTensor& t) { return t && t->requires_grad(); };
    // Only what a gradient that is asked for needs; the key, so that a late backward is noticed.
    const bool keep_x = weight.requires_grad() || asks(lora_A) || asks(lora_B);
    const bool keep_A = lora_A && (x.requires_grad() || asks(lora_B) || asks(lora_A));
    const bool keep_B = lora_B && (x.requires_grad() || asks(lora_B) || asks(lora_A));
    ctx->save_for_backward({rest.key, rest.row_scale, weight, keep_x ? x : Tensor(),
                            keep_A ? *lora_A : Tensor(), keep_B ? *lora_B : Tensor()});
    ctx->saved_data["rest"] =
        std::vector<int64_t>{rest.elementwise,
                             rest.compute_dtype ? static_cast<int64_t>(*rest.compute_dtype) : -1,
                             rest.panel_bytes,
                             rest.block_bytes,
                             rest.row_offset,
                             rest.col_offset,
                             bias ? static_cast<int64_t>(bias->scalar_type()) : -1,
                             lora_A.has_value(),
                             std::bit_cast<int64_t>(rest.scaling)};
    return below(x, weight, bias, lora_A, lora_B, rest);
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const Variables saved = saved_variables(ctx);
    const Tensor &grad = grads[0], &key = saved[0], &row_scale = saved[1], &weight = saved[2];
    const Tensor &x = saved[3], &lora_A = saved[4], &lora_B = saved[5];
    const auto given = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const std::vector<int64_t> rest = ctx->saved_data["rest"].toIntVector();
    const bool has_bias = rest[6] >= 0, has_adapters = rest[7] != 0;
    const OptionalDtype compute_dtype =
        rest[1] < 0 ? OptionalDtype() : static_cast<at::ScalarType>(rest[1]);
    // By edge: tensors that were not given have none.
    const size_t edge_A = 2 + has_bias;
    const bool need_x = ctx->needs_input_grad(0), need_weight = ctx->needs_input_grad(1);
    const bool need_bias = has_bias && ctx->needs_input_grad(2);
    const bool need_A = has_adapters && ctx->needs_input_grad(edge_A);
    const bool need_B = has_adapters && ctx->needs_input_grad(edge_A + 1);

    Tensor grad_x, grad_weight, grad_bias, grad_A, grad_B;
    if (need_x || need_A || need_B) {
      static const auto op = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(Backend::kBackward, "")
                                 .template typed<decltype(flatkern::backward<Backend>)>();
      // With autograd the op itself refuses second derivatives.
      std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
      if (!at::GradMode::is_enabled()) guard.emplace();
      std::vector<Tensor> found =
          op.call(grad, given(x), weight, given(lora_A), given(lora_B),
                  std::bit_cast<double>(rest[8]), row_scale, key, need_x, need_A, need_B,
                  rest[0] != 0, compute_dtype, rest[2], rest[3], rest[4], rest[5]);
      auto next = found.begin();
      if (need_x) grad_x = *next++;
      if (need_A) grad_A = *next++;
      if (need_B) grad_B = *next++;
    }
    if (need_weight || need_bias) {
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      const at::ScalarType dtype = compute_dtype.value_or(weight.scalar_type());
      const Tensor grad2 = flat(grad).to(dtype);
      if (need_weight) grad_weight = at::mm(grad2.t(), flat(x).to(dtype)).to(weight.scalar_type());
      if (need_bias) grad_bias = grad2.sum(0).to(static_cast<at::ScalarType>(rest[6]));
    }
    return {grad_x, grad_weight, grad_bias, grad_A, grad_B, Tensor()};
  }

 private:
  static Tensor below(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& lora_A, const OptionalTensor& lora_B,
                      const Rest& rest) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow(Backend::kNoisyLinear, "")
                               .template typed<decltype(flatkern::forward<Backend>)>();
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, weight, bias, lora_A, lora_B, rest.scaling, rest.row_scale, rest.key,
                   rest.elementwise, rest.compute_dtype, rest.panel_bytes, rest.block_bytes,
                   rest.row_offset, rest.col_offset);
  }

  static Variables saved_variables(Context* ctx) {
    try {
      return ctx->get_saved_variables();
    } catch (const c10::Error& error) {
      const std::string what = error.what_without_backtrace();
      if (what.find("modified by an inplace operation") == std::string::npos) throw;
      // The text of flatkern/ops/noisy_linear.py.
      TORCH_CHECK(false, kOp,
                  ": backward after the noise window of its forward was closed, or after something "
                  "that it needs was written; call backward inside the window (",
                  what, ")");
    }
  }
};

// What autograd's graph names.
struct NoisyLinearCpu : torch::autograd::Function<NoisyLinearCpu>, Steps<Cpu> {};
#ifdef FLATKERN_CUDA_VERSION
struct NoisyLinearCuda : torch::autograd::Function<NoisyLinearCuda>, Steps<Cuda> {};
#endif

// What a layer calls: under autocast x is cast, and the noise added in the cast, as nn.Linear would
// cast its weight.
template <class Backend>
Tensor layer(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const OptionalTensor& lora_A, const OptionalTensor& lora_B, double scaling,
             const Tensor& row_scale, const Tensor& key, bool elementwise, int64_t panel_bytes,
             int64_t block_bytes) {
  OptionalDtype dtype;
  const c10::DeviceType device = x.device().type();
  if (x.scalar_type() != at::kDouble && at::autocast::is_autocast_enabled(device))
    dtype = at::autocast::get_autocast_dtype(device);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(Backend::kNoisyLinear, "")
                             .template typed<decltype(flatkern::forward<Backend>)>();
  return op.call(dtype ? x.to(*dtype) : x, weight, bias, lora_A, lora_B, scaling, row_scale, key,
                 elementwise, dtype, panel_bytes, block_bytes, 0, 0);
}

template <class Backend>
void register_below(torch::Library& m) {
  m.impl("noisy_linear", forward<Backend>);
  m.impl("noisy_linear_backward", backward<Backend>);
}

}  // namespace

NoisyLayer* noisy_layer(c10::DeviceType device) {
#ifdef FLATKERN_CUDA_VERSION
  if (device == c10::DeviceType::CUDA) return layer<Cuda>;
#endif
  return device == c10::DeviceType::CPU ? layer<Cpu> : nullptr;
}

// For all devices: where the tensors are not on one, the checks say so.
TORCH_LIBRARY_IMPL(flatkern_cpu, CompositeExplicitAutograd, m) { register_below<Cpu>(m); }
TORCH_LIBRARY_IMPL(flatkern_cpu, Autograd, m) { m.impl("noisy_linear", Steps<Cpu>::call); }
#ifdef FLATKERN_CUDA_VERSION
TORCH_LIBRARY_IMPL(flatkern_cuda, CompositeExplicitAutograd, m) { register_below<Cuda>(m); }
TORCH_LIBRARY_IMPL(flatkern_cuda, Autograd, m) { m.impl("noisy_linear", Steps<Cuda>::call); }
#endif

}  // namespace flatkern

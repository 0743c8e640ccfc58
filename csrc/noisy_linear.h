// noisy_linear of the native backends: what it asks of them, and what layers call.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace flatkern {

// A part of a weight [m, n] that noise is added to. The tensors and the offsets are those of all of
// it, and have been checked.
struct NoisyPanel {
  const at::Tensor &weight, &row_scale, &words;
  bool elementwise;
  int64_t row_offset, col_offset;
  int64_t row, col, rows, cols;
};

// Writes the noisy values of a panel densely into `out`, in its dtype.
namespace cpu {
void perturb_panel(const NoisyPanel& panel, const at::Tensor& out);
}
namespace cuda {
void perturb_panel(const NoisyPanel& panel, const at::Tensor& out);
}

// x (W_noisy + s B A)^T + b, in the dtype that nn.Linear would give. Panels of the noisy weight and
// the low-rank part's blocks of tokens take no more than so many bytes.
using NoisyLayer = at::Tensor(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias,
                              const std::optional<at::Tensor>& lora_A,
                              const std::optional<at::Tensor>& lora_B, double scaling,
                              const at::Tensor& row_scale, const at::Tensor& key, bool elementwise,
                              int64_t panel_bytes, int64_t block_bytes);

// That of a device's backend, or nullptr.
NoisyLayer* noisy_layer(c10::DeviceType device);

}  // namespace flatkern

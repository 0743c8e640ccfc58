// The products of noisy_linear in C++: noisy panels in bounded scratch, then torch's own product.
// What flatkern/ops/_noisy_linear.py does, in the same order, so that the bits are the same.
//
// Everything here runs below autograd, on checked arguments, with autocast off.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "noisy_linear.h"

namespace flatkern {

// [..., n] as [tokens, n]; the sizes are spelled out because n may be 0.
inline at::Tensor flat(const at::Tensor& x) {
  return x.dim() == 2
             ? x
             : x.reshape({c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), x.size(-1)});
}

// [tokens, k] as [..., k]; a result of ours, so not as a view: autograd lets nobody write those.
inline at::Tensor shaped(const at::Tensor& result, at::IntArrayRef like, int64_t last) {
  if (like.size() == 2) return result;
  std::vector<int64_t> shape(like.begin(), like.end());
  shape.back() = last;
  return at::_unsafe_view(result, shape);
}

// How many of `length` rows, columns or tokens of `bytes_each` go at a time.
inline int64_t step_of(int64_t length, int64_t bytes_each, int64_t scratch_bytes) {
  const int64_t fit = scratch_bytes / std::max<int64_t>(bytes_each, 1);
  if (fit >= length) return std::max<int64_t>(length, 1);
  // Whole cache lines and vector registers, where that many fit.
  return fit >= 64 ? fit / 64 * 64 : std::max<int64_t>(fit, 1);
}

// f(begin, end) over [0, length); once if it is empty.
template <class F>
void for_steps(int64_t length, int64_t step, const F& f) {
  int64_t begin = 0;
  do {
    f(begin, std::min(begin + step, length));
    begin += step;
  } while (begin < length);
}

// Of a matrix, or the matrix itself where that is all of it: a view costs as much as a small sum.
inline at::Tensor rows_of(const at::Tensor& t, int64_t begin, int64_t end) {
  return begin == 0 && end == t.size(0) ? t : t.slice(0, begin, end);
}

// W_noisy [m, n] in `dtype`, which exists a panel at a time only.
struct NoisyWeight {
  void (*perturb_panel)(const NoisyPanel&, const at::Tensor&);
  const at::Tensor &weight, &row_scale;
  const at::Tensor words;
  const bool elementwise;
  const at::ScalarType dtype;
  const int64_t panel_bytes, row_offset, col_offset;

  // x W_noisy^T + b, [tokens, m], from x [tokens, n] and b [m] in `dtype`.
  at::Tensor product(const at::Tensor& x, const std::optional<at::Tensor>& bias) const {
    const int64_t rows = weight.size(0), cols = weight.size(1);
    const int64_t step = step_of(rows, cols * c10::elementSize(dtype), panel_bytes);
    const at::Tensor scratch = at::empty({std::min(step, rows) * cols}, x.options());
    const auto panel = [&](int64_t begin, int64_t end) {
      perturb(scratch, begin, 0, end - begin, cols);
      return scratch.as_strided({end - begin, cols}, {cols, 1});
    };
    // The op that a plain layer calls: in 16 bits its bits are not always those of a sum of two.
    if (step >= rows) return at::linear(x, panel(0, rows), bias);
    const at::Tensor y = at::empty({x.size(0), rows}, x.options());
    for_steps(rows, step, [&](int64_t begin, int64_t end) {
      const at::Tensor noisy = panel(begin, end).t();
      at::Tensor out = y.slice(1, begin, end);
      if (bias) {
        at::addmm_out(out, bias->slice(0, begin, end), x, noisy);
      } else {
        at::mm_out(out, x, noisy);
      }
    });
    return y;
  }

  // grad W_noisy, [tokens, n], from grad [tokens, m]. In column panels: no reduction is split, and
  // none accumulates in 16 bits.
  at::Tensor product_transposed(const at::Tensor& grad) const {
    const int64_t rows = weight.size(0), cols = weight.size(1);
    const int64_t step = step_of(cols, rows * c10::elementSize(dtype), panel_bytes);
    const at::Tensor scratch = at::empty({rows * std::min(step, cols)}, grad.options());
    const auto panel = [&](int64_t begin, int64_t end) {
      perturb(scratch, 0, begin, rows, end - begin);
      return scratch.as_strided({rows, end - begin}, {end - begin, 1});
    };
    if (step >= cols) return at::mm(grad, panel(0, cols));
    const at::Tensor grad_x = at::empty({grad.size(0), cols}, grad.options());
    for_steps(cols, step, [&](int64_t begin, int64_t end) {
      at::Tensor out = grad_x.slice(1, begin, end);
      at::mm_out(out, grad, panel(begin, end));
    });
    return grad_x;
  }

 private:
  void perturb(const at::Tensor& scratch, int64_t row, int64_t col, int64_t rows,
               int64_t cols) const {
    perturb_panel(
        {weight, row_scale, words, elementwise, row_offset, col_offset, row, col, rows, cols},
        scratch);
  }
};

// Their sum, in at least float32 where there are several parts.
inline void add_to(at::Tensor& total, const at::Tensor& part) {
  total = total.defined() ? total.to(at::promote_types(part.scalar_type(), at::kFloat)).add_(part)
                          : part;
}

// s B A with A [r, n] and B [m, r] in the dtype of their products, never formed. Everything is
// rounded in the order of plain LoRA's autograd, a block of tokens at a time.
struct Adapters {
  const at::Tensor lora_A, lora_B;
  const double scaling;
  const int64_t block_bytes;

  int64_t tokens_at_a_time(int64_t tokens) const {
    const int64_t width = std::max(lora_A.size(1), lora_B.size(0));
    return step_of(tokens, width * lora_A.element_size(), block_bytes);
  }

  // y [tokens, m] += s (x A^T) B^T, rounded to y's dtype once.
  void add_product(const at::Tensor& y, const at::Tensor& x) const {
    const at::Tensor transposed_A = lora_A.t(), transposed_B = lora_B.t();
    // As Python does it: mul_ of a scalar would round that to 16 bits.
    const at::Tensor factor = at::native::wrapped_scalar_tensor(scaling);
    for_steps(x.size(0), tokens_at_a_time(x.size(0)), [&](int64_t begin, int64_t end) {
      const at::Tensor here = rows_of(x, begin, end).to(lora_A.scalar_type());
      const at::Tensor branch = at::mm(at::mm(here, transposed_A), transposed_B).mul_(factor);
      rows_of(y, begin, end).add_(branch);
    });
  }

  // grad_x += s (grad B) A where it is defined; the gradients of A and B that are asked for.
  void backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grad_x,
                at::Tensor* grad_A, at::Tensor* grad_B) const {
    const at::Tensor transposed_A = lora_A.t();
    for_steps(grad.size(0), tokens_at_a_time(grad.size(0)), [&](int64_t begin, int64_t end) {
      const at::ScalarType dtype = lora_A.scalar_type();
      const at::Tensor scaled = rows_of(grad, begin, end).to(dtype).mul(scaling);
      const at::Tensor here = x.defined() ? rows_of(x, begin, end).to(dtype) : at::Tensor();
      if (grad_x.defined() || grad_A) {
        const at::Tensor down = at::mm(scaled, lora_B);
        if (grad_x.defined()) rows_of(grad_x, begin, end).add_(at::mm(down, lora_A));
        if (grad_A) add_to(*grad_A, at::mm(down.t(), here));
      }
      if (grad_B) add_to(*grad_B, at::mm(scaled.t(), at::mm(here, transposed_A)));
    });
  }
};

}  // namespace flatkern

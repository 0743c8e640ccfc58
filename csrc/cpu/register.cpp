// The CPU kernels as torch ops: threading and registration.
#include <ATen/ATen.h>
#include <torch/csrc/stable/ops.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../register.h"
#include "kernels.h"

namespace flatkern::cpu {
namespace {

// Fewer elements than this are not worth another thread.
constexpr int64_t kGrainElements = 32768;

// A task of this many work units, which cost as much as this many elements each.
struct Task {
  int64_t units, cost;

  Task(int64_t units, int64_t elements) : units(units), cost(std::max<int64_t>(1, elements)) {}
};

// f(i, begin, end) for the units of each task i, on torch's own thread pool (without compiling
// against its OpenMP): threads share the cost of all tasks, so that small ones keep them busy too.
template <class F>
void parallel_for(const std::vector<Task>& tasks, const F& f) {
  std::vector<int64_t> start{0};
  for (const Task& task : tasks) start.push_back(start.back() + task.units * task.cost);
  torch::stable::parallel_for(0, start.back(), kGrainElements, [&](int64_t begin, int64_t end) {
    const auto after = std::upper_bound(start.begin(), start.end(), begin);
    for (size_t i = after - start.begin() - 1; i < tasks.size() && start[i] < end; ++i) {
      // A unit is run where its first element is: this is the first from `element` on.
      const auto unit_from = [&](int64_t element) {
        const int64_t inside = element - start[i] + tasks[i].cost - 1;
        return std::clamp<int64_t>(inside / tasks[i].cost, 0, tasks[i].units);
      };
      const int64_t first = unit_from(begin), last = unit_from(end);
      if (first < last) f(i, first, last);
    }
  });
}

template <class Args>
void for_blocks(const std::vector<Args>& tensors, void (*run)(const Args&, int64_t, int64_t)) {
  std::vector<Task> tasks;
  for (const Args& args : tensors) {
    const Window& w = args.window;
    tasks.push_back({w.rows * blocks_per_row(w.cols), std::min(w.cols, kBlockCols)});
  }
  parallel_for(tasks, [&](size_t i, int64_t begin, int64_t end) { run(tensors[i], begin, end); });
}

// What the chunks of a tensor counted: the words that they asked for, and how many were left out.
struct Counts {
  std::atomic<uint64_t> asked{0};
  std::atomic<uint32_t> left_out{0};
};

// Runs over the chunks of all tensors.
std::vector<Counts> run_residual(const std::vector<PerturbArgs>& tensors, at::TensorList residuals,
                                 void (*run)(const ResidualArgs&, int64_t, int64_t)) {
  std::vector<Counts> counts(tensors.size());
  std::vector<ResidualArgs> all;
  std::vector<Task> tasks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Chunks chunks{tensors[i].window.rows, tensors[i].window.cols};
    const ResidualParts parts = parts_of(residuals[i], chunks);
    all.push_back({tensors[i], chunks, parts.directory, parts.pool, parts.capacity,
                   &counts[i].asked, &counts[i].left_out});
    tasks.push_back({chunks.count(), kChunk});
  }
  parallel_for(tasks, [&](size_t i, int64_t begin, int64_t end) { run(all[i], begin, end); });
  return counts;
}

ResidualHeader& header_of(const at::Tensor& residual) {
  return *static_cast<ResidualHeader*>(residual.mutable_data_ptr());
}

// What flatkern::Ops asks of a backend; the tensor that is written is first.
struct Backend {
  using Window = cpu::Window;
  using NoiseArgs = cpu::NoiseArgs;
  using PerturbArgs = cpu::PerturbArgs;
  using RowNormArgs = cpu::RowNormArgs;
  static constexpr const char* kName = "flatkern_cpu";
  static constexpr c10::DeviceType kDevice = c10::DeviceType::CPU;

  static NoiseKey key_of(const int64_t* words) {
    return {static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]),
            static_cast<uint32_t>(words[2]), static_cast<uint32_t>(words[3])};
  }
  static void philox_bits(const at::Tensor&, const NoiseArgs& args) {
    for_blocks<NoiseArgs>({args}, kernels().philox_bits);
  }
  static void noise(const at::Tensor&, const NoiseArgs& args) {
    for_blocks<NoiseArgs>({args}, kernels().noise);
  }
  static void perturb(const at::Tensor&, const std::vector<PerturbArgs>& tensors) {
    for_blocks(tensors, kernels().perturb);
  }
  static void restore(const at::Tensor&, const std::vector<PerturbArgs>& tensors) {
    for_blocks(tensors, kernels().restore);
  }
  static void perturb_residual(const std::vector<PerturbArgs>& tensors, at::TensorList residuals) {
    const auto counts = run_residual(tensors, residuals, kernels().perturb_residual);
    for (size_t i = 0; i < counts.size(); ++i) {
      header_of(residuals[i]).asked = counts[i].asked;
      header_of(residuals[i]).clean = counts[i].left_out;
    }
  }
  static void restore_residual(const std::vector<PerturbArgs>& tensors, at::TensorList residuals) {
    const auto counts = run_residual(tensors, residuals, kernels().restore_residual);
    for (size_t i = 0; i < counts.size(); ++i) {
      header_of(residuals[i]).mismatched = counts[i].left_out;
    }
  }
  // float32, B times scaling, A padded with zeros and 16-byte aligned: both are small.
  static std::pair<at::Tensor, at::Tensor> adapters(const at::Tensor& lora_A,
                                                    const at::Tensor& lora_B, double scaling) {
    const int64_t padding = (kNormLanes - lora_A.size(1) % kNormLanes) % kNormLanes;
    at::Tensor padded = lora_A.to(at::kFloat);
    if (padding != 0) padded = at::constant_pad_nd(padded, {0, padding});
    padded = padded.contiguous();
    // A slice of a larger tensor may start anywhere.
    if (reinterpret_cast<uintptr_t>(padded.const_data_ptr()) % 16 != 0) padded = padded.clone();
    return {padded, (lora_B.to(at::kFloat) * scaling).contiguous()};
  }
  static void set_adapters(RowNormArgs& args, const at::Tensor& lora_A, const at::Tensor& lora_B,
                           double) {
    args.lora_A = lora_A.const_data_ptr<float>();
    args.lora_A_stride = lora_A.size(1);
    args.lora_B = lora_B.const_data_ptr<float>();
  }
  static void row_norm(const at::Tensor&, const std::vector<RowNormArgs>& tensors) {
    std::vector<Task> tasks;
    for (const RowNormArgs& args : tensors)
      tasks.push_back({args.rows, args.cols * (1 + args.rank)});
    parallel_for(tasks, [&](size_t i, int64_t begin, int64_t end) {
      kernels().row_norm(tensors[i], begin, end);
    });
  }
  static void perturb_merged(const at::Tensor&, const PerturbArgs& perturb,
                             const RowNormArgs& row_norm, float relative_scale) {
    const PerturbMergedArgs args{perturb, row_norm, relative_scale};
    parallel_for({{row_norm.rows, row_norm.cols}}, [&](size_t, int64_t begin, int64_t end) {
      kernels().perturb_merged(args, begin, end);
    });
  }
};

}  // namespace

void perturb_panel(const NoisyPanel& panel, const at::Tensor& out) {
  Ops<Backend>::perturb_panel(panel, out);
}

TORCH_LIBRARY_IMPL(flatkern_cpu, CPU, m) { Ops<Backend>::register_in(m); }

}  // namespace flatkern::cpu

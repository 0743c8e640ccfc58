// The CPU kernels as torch ops: threading and registration.
#include <ATen/ATen.h>
#include <torch/csrc/stable/ops.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
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
    const Block& w = args.block;
    tasks.push_back({w.rows * blocks_per_row(w.cols), std::min(w.cols, kBlockCols)});
  }
  parallel_for(tasks, [&](size_t i, int64_t begin, int64_t end) { run(tensors[i], begin, end); });
}

// What the chunks of a tensor counted: the words that they asked for, and how many were left out.
struct Counts {
  std::atomic<uint64_t> asked{0};
  std::atomic<uint32_t> left_out{0};
};

ResidualParts parts_of(const PerturbArgs& args, const at::Tensor& residual) {
  return flatkern::parts_of(residual, {args.block.rows, args.block.cols});
}

// Runs over the chunks of all tensors.
std::vector<Counts> run_residual(const std::vector<PerturbArgs>& tensors, at::TensorList residuals,
                                 void (*run)(const ResidualArgs&, int64_t, int64_t)) {
  std::vector<Counts> counts(tensors.size());
  std::vector<ResidualArgs> all;
  std::vector<Task> tasks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ResidualParts parts = parts_of(tensors[i], residuals[i]);
    all.push_back({tensors[i],
                   {tensors[i].block.rows, tensors[i].block.cols},
                   parts.directory,
                   parts.pool,
                   parts.capacity,
                   &counts[i].asked,
                   &counts[i].left_out});
    tasks.push_back({all[i].chunks.count(), kChunk});
  }
  parallel_for(tasks, [&](size_t i, int64_t begin, int64_t end) { run(all[i], begin, end); });
  return counts;
}

ResidualHeader& header_in(const at::Tensor& residual) {
  return *static_cast<ResidualHeader*>(residual.mutable_data_ptr());
}

ResidualHeader header_of(const PerturbArgs& args, const at::Tensor& residual) {
  static const uint64_t implementation = implementation_of(std::string("cpu ") + FLATKERN_COMPILER +
                                                           FLATKERN_CXX_FLAGS + kernels().name);
  uint64_t scales = 0;
  for (int64_t row = 0; row < args.block.rows; ++row) {
    scales += mixed_scale(args.row_scale[row], row);
  }
  return flatkern::header_of(args, args.block.key, scales, implementation,
                             parts_of(args, residual).capacity);
}

// What flatkern::Ops asks of a backend; the tensor that is written is first.
struct Backend {
  using Block = cpu::Block;
  using NoiseArgs = cpu::NoiseArgs;
  using PerturbArgs = cpu::PerturbArgs;
  using PlaneArgs = cpu::PlaneArgs;
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
  static void uniform(const at::Tensor&, const NoiseArgs& args) {
    for_blocks<NoiseArgs>({args}, kernels().uniform);
  }
  static void perturb(const at::Tensor&, const std::vector<PerturbArgs>& tensors) {
    for_blocks(tensors, kernels().perturb);
  }
  static void restore(const at::Tensor&, const std::vector<PerturbArgs>& tensors) {
    for_blocks(tensors, kernels().restore);
  }
  static void perturb_plane(const at::Tensor&, const PlaneArgs& args) {
    const Block& w = args.perturb.block;
    // Two noises an element.
    const Task task{w.rows * blocks_per_row(w.cols), 2 * std::min(w.cols, kBlockCols)};
    parallel_for({task}, [&](size_t, int64_t begin, int64_t end) {
      kernels().perturb_plane(args, begin, end);
    });
  }
  // Notes a perturbation in all headers; if one refuses the call, in those that do why, and that
  // is all.
  template <bool Restores>
  static bool admits(const std::vector<PerturbArgs>& tensors, at::TensorList residuals) {
    std::vector<ResidualHeader> headers;
    bool admitted = true;
    for (size_t i = 0; i < tensors.size(); ++i) {
      headers.push_back(header_of(tensors[i], residuals[i]));
      ResidualHeader& then = header_in(residuals[i]);
      const uint32_t refused = refusal_of(headers[i], then, Restores);
      if (refused == 0) continue;
      admitted = false;
      // Other bytes are not ours to write.
      if (refused != kOtherBytes) then.refused = refused;
    }
    // A restore counts as done when it is: until then it can be tried again.
    for (size_t i = 0; admitted && !Restores && i < tensors.size(); ++i) {
      begin(header_in(residuals[i]), headers[i], Restores);
    }
    return admitted;
  }
  static void perturb_residual(const std::vector<PerturbArgs>& tensors, at::TensorList residuals) {
    const auto counts = run_residual(tensors, residuals, kernels().perturb_residual);
    for (size_t i = 0; i < counts.size(); ++i) {
      header_in(residuals[i]).asked = counts[i].asked;
      header_in(residuals[i]).clean = counts[i].left_out;
    }
  }
  static void restore_residual(const std::vector<PerturbArgs>& tensors, at::TensorList residuals) {
    const auto counts = run_residual(tensors, residuals, kernels().restore_residual);
    for (size_t i = 0; i < counts.size(); ++i) {
      ResidualHeader& header = header_in(residuals[i]);
      header.refused = 0;
      header.mismatched = counts[i].left_out;
      header.state = counts[i].left_out == 0 ? kEmpty : kFilled;
    }
  }
  // float32; A padded with zeros and 16-byte aligned; B times scaling, those of all tensors in a
  // room.
  struct Adapters {
    at::Tensor lora_A, room;
    const float* lora_B = nullptr;
  };
  static std::vector<Adapters> adapters(at::TensorList lora_As, at::TensorList lora_Bs,
                                        at::ArrayRef<double> scalings) {
    int64_t elements = 0;
    for (const at::Tensor& lora_B : lora_Bs) elements += lora_B.numel();
    const at::Tensor room = at::empty({elements}, at::kFloat);
    float* next = room.mutable_data_ptr<float>();
    std::vector<Adapters> all;
    for (size_t i = 0; i < lora_As.size(); ++i) {
      all.push_back({padded(lora_As[i]), room, next});
      const at::Tensor wide = lora_Bs[i].to(at::kFloat).contiguous();
      const float* in = wide.const_data_ptr<float>();
      const float scaling = static_cast<float>(scalings[i]);
      for (int64_t k = 0; k < wide.numel(); ++k) *next++ = in[k] * scaling;
    }
    return all;
  }
  static void set_adapters(RowNormArgs& args, const Adapters& adapters) {
    args.lora_A = adapters.lora_A.const_data_ptr<float>();
    args.lora_A_stride = adapters.lora_A.size(1);
    args.lora_B = adapters.lora_B;
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
                             const RowNormArgs& row_norm) {
    const PerturbMergedArgs args{perturb, row_norm};
    parallel_for(
        {{args.row_norm.rows, args.row_norm.cols}},
        [&](size_t, int64_t begin, int64_t end) { kernels().perturb_merged(args, begin, end); });
  }

 private:
  static at::Tensor padded(const at::Tensor& lora_A) {
    const int64_t padding = (kNormLanes - lora_A.size(1) % kNormLanes) % kNormLanes;
    at::Tensor padded = lora_A.to(at::kFloat);
    if (padding != 0) padded = at::constant_pad_nd(padded, {0, padding});
    padded = padded.contiguous();
    // A slice of a larger tensor may start anywhere.
    if (reinterpret_cast<uintptr_t>(padded.const_data_ptr()) % 16 != 0) padded = padded.clone();
    return padded;
  }
};

}  // namespace

void perturb_panel(const NoisyPanel& panel, const at::Tensor& out) {
  Ops<Backend>::perturb_panel(panel, out);
}

TORCH_LIBRARY_IMPL(flatkern_cpu, CPU, m) { Ops<Backend>::register_in(m); }

}  // namespace flatkern::cpu

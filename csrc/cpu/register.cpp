// The CPU kernels as torch ops: threading and registration.
#include <ATen/ATen.h>
#include <torch/csrc/stable/ops.h>
#include <torch/library.h>

#include <utility>

#include "../register.h"
#include "kernels.h"

namespace flatkern::cpu {
namespace {

// Fewer elements than this are not worth another thread.
constexpr int64_t kGrainElements = 32768;

// torch's own thread pool, without compiling against its OpenMP.
template <class F>
void parallel_for(int64_t units, int64_t elements_per_unit, const F& f) {
  const int64_t grain =
      std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_unit));
  torch::stable::parallel_for(0, units, grain, f);
}

template <class Args>
void for_blocks(const Args& args, void (*run)(const Args&, int64_t, int64_t)) {
  const Window& w = args.window;
  parallel_for(w.rows * blocks_per_row(w.cols), std::min(w.cols, kBlockCols),
               [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

// Runs over the chunks; returns the words that they asked for and how many were left out.
std::pair<uint64_t, uint32_t> run_residual(const PerturbArgs& perturb, const at::Tensor& residual,
                                           void (*run)(const ResidualArgs&, int64_t, int64_t)) {
  const Chunks chunks{perturb.window.rows, perturb.window.cols};
  const ResidualParts parts = parts_of(residual, chunks);
  std::atomic<uint64_t> asked{0};
  std::atomic<uint32_t> left_out{0};
  const ResidualArgs args{perturb,        chunks, parts.directory, parts.pool,
                          parts.capacity, &asked, &left_out};
  parallel_for(chunks.count(), kChunk, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {asked.load(), left_out.load()};
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
  static constexpr int64_t kAdapterColumns = kNormLanes;

  static NoiseKey key_of(const int64_t* words) {
    return {static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]),
            static_cast<uint32_t>(words[2]), static_cast<uint32_t>(words[3])};
  }
  static void philox_bits(const at::Tensor&, const NoiseArgs& args) {
    for_blocks(args, kernels().philox_bits);
  }
  static void noise(const at::Tensor&, const NoiseArgs& args) { for_blocks(args, kernels().noise); }
  static void perturb(const at::Tensor&, const PerturbArgs& args) {
    for_blocks(args, kernels().perturb);
  }
  static void restore(const at::Tensor&, const PerturbArgs& args) {
    for_blocks(args, kernels().restore);
  }
  static void perturb_residual(const PerturbArgs& args, const at::Tensor& residual) {
    const auto [asked, left_out] = run_residual(args, residual, kernels().perturb_residual);
    header_of(residual).asked = asked;
    header_of(residual).clean = left_out;
  }
  static void restore_residual(const PerturbArgs& args, const at::Tensor& residual) {
    header_of(residual).mismatched =
        run_residual(args, residual, kernels().restore_residual).second;
  }
  static void row_norm(const at::Tensor&, const RowNormArgs& args) {
    parallel_for(args.rows, args.cols * (1 + args.rank),
                 [&](int64_t begin, int64_t end) { kernels().row_norm(args, begin, end); });
  }
  static void perturb_merged(const at::Tensor&, const PerturbArgs& perturb,
                             const RowNormArgs& row_norm, float relative_scale) {
    const PerturbMergedArgs args{perturb, row_norm, relative_scale};
    parallel_for(row_norm.rows, row_norm.cols,
                 [&](int64_t begin, int64_t end) { kernels().perturb_merged(args, begin, end); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(flatkern_cpu, CPU, m) { Ops<Backend>::register_in(m); }

}  // namespace flatkern::cpu

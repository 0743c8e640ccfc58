// The CUDA kernels as torch ops: device, stream, launch checks and registration. Nothing here
// synchronises, so every op can be captured in a graph.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <string>

#include "../register.h"
#include "kernels.h"
#include "launch.h"

namespace flatkern::cuda {
namespace {

template <class Args>
void launch(const at::Tensor& on, void (*launcher)(const Args&, int, cudaStream_t),
            const Args& args) {
  const c10::cuda::CUDAGuard guard(on.device());
  launcher(args, at::cuda::getCurrentDeviceProperties()->multiProcessorCount,
           c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

uint64_t implementation_on(const cudaDeviceProp& device) {
  return implementation_of(std::string("cuda ") + FLATKERN_CUDA_VERSION + FLATKERN_CUDA_ARCHS +
                           FLATKERN_NVCC_FLAGS + device.name + std::to_string(device.major) + "." +
                           std::to_string(device.minor));
}

std::vector<ResidualArgs> with_residuals(const std::vector<PerturbArgs>& tensors,
                                         at::TensorList residuals) {
  const uint64_t implementation =
      implementation_on(*at::cuda::getDeviceProperties(residuals[0].get_device()));
  std::vector<ResidualArgs> all;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const PerturbArgs& perturb = tensors[i];
    const Chunks chunks{perturb.window.rows, perturb.window.cols};
    const ResidualParts parts = parts_of(residuals[i], chunks);
    all.push_back(
        {perturb, parts.header, parts.pool, parts.capacity, implementation, chunk_finder(chunks)});
  }
  return all;
}

// What flatkern::Ops asks of a backend; the tensor that is written is first.
struct Backend {
  using Block = cuda::Window;
  using NoiseArgs = cuda::NoiseArgs;
  using PerturbArgs = cuda::PerturbArgs;
  using RowNormArgs = cuda::RowNormArgs;
  static constexpr const char* kName = "flatkern_cuda";
  static constexpr c10::DeviceType kDevice = c10::DeviceType::CUDA;
  static constexpr int64_t kAdapterColumns = kVector;

  static const int64_t* key_of(const int64_t* words) { return words; }
  static void philox_bits(const at::Tensor& out, const NoiseArgs& args) {
    launch(out, launch_philox_bits, args);
  }
  static void noise(const at::Tensor& out, const NoiseArgs& args) {
    launch(out, launch_noise, args);
  }
  static void perturb(const at::Tensor& out, const std::vector<PerturbArgs>& tensors) {
    launch(out, launch_perturb, tensors);
  }
  static void restore(const at::Tensor& out, const std::vector<PerturbArgs>& tensors) {
    launch(out, launch_restore, tensors);
  }
  // The kernels compare each header themselves, and keep to its tensor what they refuse.
  template <bool>
  static bool admits(const std::vector<PerturbArgs>&, at::TensorList) {
    return true;
  }
  static void perturb_residual(const std::vector<PerturbArgs>& tensors, at::TensorList residuals) {
    launch(residuals[0], launch_perturb_residual, with_residuals(tensors, residuals));
  }
  static void restore_residual(const std::vector<PerturbArgs>& tensors, at::TensorList residuals) {
    launch(residuals[0], launch_restore_residual, with_residuals(tensors, residuals));
  }
  static void scale(const at::Tensor& values, double factor, float* out) {
    at::Tensor result = at::from_blob(out, values.sizes(), values.options().dtype(at::kFloat));
    at::mul_out(result, values.to(at::kFloat), at::Scalar(factor));
  }
  static void row_norm(const at::Tensor& norm, const std::vector<RowNormArgs>& tensors) {
    launch(norm, launch_row_norm, tensors);
  }
  static void perturb_merged(const at::Tensor& row_scale, const PerturbMergedArgs& args) {
    launch(row_scale, launch_perturb_merged, args);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(flatkern_cuda, CUDA, m) { Ops<Backend>::register_in(m); }

}  // namespace flatkern::cuda

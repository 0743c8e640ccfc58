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
    const Chunks chunks{perturb.block.rows, perturb.block.cols};
    const ResidualParts parts = parts_of(residuals[i], chunks);
    all.push_back(
        {perturb, parts.header, parts.pool, parts.capacity, implementation, chunk_finder(chunks)});
  }
  return all;
}

// What flatkern::Ops asks of a backend; the tensor that is written is first.
struct Backend {
  using Block = cuda::Block;
  using NoiseArgs = cuda::NoiseArgs;
  using PerturbArgs = cuda::PerturbArgs;
  using PlaneArgs = cuda::PlaneArgs;
  using RowNormArgs = cuda::RowNormArgs;
  static constexpr const char* kName = "flatkern_cuda";
  static constexpr c10::DeviceType kDevice = c10::DeviceType::CUDA;

  static const int64_t* key_of(const int64_t* words) { return words; }
  static void philox_bits(const at::Tensor& out, const NoiseArgs& args) {
    launch(out, launch_philox_bits, args);
  }
  static void noise(const at::Tensor& out, const NoiseArgs& args) {
    launch(out, launch_noise, args);
  }
  static void uniform(const at::Tensor& out, const NoiseArgs& args) {
    launch(out, launch_uniform, args);
  }
  static void perturb(const at::Tensor& out, const std::vector<PerturbArgs>& tensors) {
    launch(out, launch_perturb, tensors);
  }
  static void restore(const at::Tensor& out, const std::vector<PerturbArgs>& tensors) {
    launch(out, launch_restore, tensors);
  }
  static void perturb_plane(const at::Tensor& out, const PlaneArgs& args) {
    launch(out, launch_perturb_plane, args);
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
  // As they lie in memory, of any of the three dtypes.
  struct Adapters {
    at::Tensor lora_A, lora_B;
    double scaling;
  };
  static std::vector<Adapters> adapters(at::TensorList lora_As, at::TensorList lora_Bs,
                                        at::ArrayRef<double> scalings) {
    const auto own = [](const at::Tensor& lora) {
      return lora.scalar_type() == at::kDouble ? lora.to(at::kFloat) : lora;
    };
    std::vector<Adapters> all;
    for (size_t i = 0; i < lora_As.size(); ++i) {
      all.push_back({own(lora_As[i]), own(lora_Bs[i]), scalings[i]});
    }
    return all;
  }
  static void set_adapters(RowNormArgs& args, const Adapters& adapters) {
    const auto own = [](const at::Tensor& lora) {
      return Adapter{lora.const_data_ptr(), Ops<Backend>::dtype_of(lora), lora.stride(0),
                     lora.stride(1)};
    };
    args.lora_A = own(adapters.lora_A);
    args.lora_B = own(adapters.lora_B);
    args.scaling = static_cast<float>(adapters.scaling);
  }
  static void row_norm(const at::Tensor& norm, const std::vector<RowNormArgs>& tensors) {
    const c10::cuda::CUDAGuard guard(norm.device());
    const at::Tensor scratch =
        at::empty({row_norm_scratch(tensors)}, norm.options().dtype(at::kByte));
    launch_row_norm(tensors, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  static void perturb_merged(const at::Tensor& row_scale, const PerturbArgs& perturb_args,
                             const RowNormArgs& args) {
    row_norm(row_scale, {args});
    perturb(row_scale, {perturb_args});
  }
};

}  // namespace

void perturb_panel(const NoisyPanel& panel, const at::Tensor& out) {
  Ops<Backend>::perturb_panel(panel, out);
}

TORCH_LIBRARY_IMPL(flatkern_cuda, CUDA, m) { Ops<Backend>::register_in(m); }

}  // namespace flatkern::cuda

// flatkern._C: what was built, and the way into it that layers take, without the parsing of a
// schema. Loading it registers the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/kernels.h"
#include "noisy_linear.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of flatkern, registered as torch ops when this module loads.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["noise_version"] = flatkern::kNoiseVersion;
        info["torch"] = FLATKERN_TORCH_VERSION;
        info["compiler"] = FLATKERN_COMPILER;
        info["flags"] = FLATKERN_CXX_FLAGS;
        info["cpu"] = flatkern::cpu::kernels().name;
#ifdef FLATKERN_CUDA_VERSION
        pybind11::dict cuda;
        cuda["version"] = FLATKERN_CUDA_VERSION;
        cuda["archs"] = FLATKERN_CUDA_ARCHS;
        cuda["flags"] = FLATKERN_NVCC_FLAGS;
        info["cuda"] = cuda;
#else
        info["cuda"] = false;
        info["why_no_cuda"] = FLATKERN_WHY_NO_CUDA;
#endif
        return info;
      },
      "torch version, compiler, flags, CPU instruction set in use, and the CUDA build or why "
      "none.");
  m.def("noisy_layer_cpu", flatkern::noisy_layer(c10::DeviceType::CPU),
        pybind11::call_guard<pybind11::gil_scoped_release>());
#ifdef FLATKERN_CUDA_VERSION
  m.def("noisy_layer_cuda", flatkern::noisy_layer(c10::DeviceType::CUDA),
        pybind11::call_guard<pybind11::gil_scoped_release>());
#endif
}

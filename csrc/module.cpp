// flatkern._C: what was built. Loading it registers the kernels.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

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
}

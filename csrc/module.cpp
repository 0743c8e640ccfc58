// flatkern._C: what was built. Loading it registers the kernels.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of flatkern, registered as torch ops when this module loads.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = FLATKERN_TORCH_VERSION;
        info["compiler"] = FLATKERN_COMPILER;
        info["flags"] = FLATKERN_CXX_FLAGS;
        info["cpu"] = flatkern::cpu::kernels().name;
        info["cuda"] = false;
        return info;
      },
      "torch version, compiler, flags, CPU instruction set in use, and whether CUDA was built.");
}

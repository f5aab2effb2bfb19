// The Python module. Operators go through torch's dispatcher (csrc/cpu, csrc/cuda register
// themselves); the module itself only says what was built.
#include <pybind11/pybind11.h>

#include "cpu/capability.h"

namespace py = pybind11;

#define SPPO_STR2(x) #x
#define SPPO_STR(x) SPPO_STR2(x)

static py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#ifdef SPPO_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["torch_target_version"] = SPPO_STR(TORCH_TARGET_VERSION);
  info["cpu_capability"] = sppo::capability_name(sppo::cpu_capability());
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of sppo_kernels";
  m.def("build_info", &build_info,
        "What this binary was built with, and the CPU instruction set chosen at run time.");
}

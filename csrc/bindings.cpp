// The Python module. Operators go through torch's dispatcher (csrc/cpu, csrc/cuda register
// themselves); the module itself only says what was built.
#include <pybind11/pybind11.h>

#include "cpu/capability.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <cstdint>

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

// Fresh gradients of hundreds of megabytes otherwise spend most of their time in 4 KiB page faults.
static void prefer_huge_pages(uintptr_t data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (data + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (data + bytes) & ~(kPage - 1);
  // Advice only: a kernel that declines it changes nothing.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of sppo_kernels";
  m.def("build_info", &build_info,
        "What this binary was built with, and the CPU instruction set chosen at run time.");
  m.def("prefer_huge_pages", &prefer_huge_pages, py::arg("data"), py::arg("bytes"),
        "Ask the system to back this memory with huge pages; never fails.");
}

"""Builds `sppo_kernels._C`: the CPU part always, the CUDA part when a toolkit is found.

The extension uses LibTorch's stable ABI, so one binary serves every torch from 2.10 on. The `.cu`
files are free of torch headers: they compile against a CPU-only torch, and no GPU is ever looked
for. `FORCE_CUDA=1` makes a missing toolkit an error, `FORCE_CUDA=0` leaves CUDA out. Without a
compiler or without torch at build time, or with `SPPO_KERNELS_NATIVE=0`, the package is installed
without the extension. `SPPO_KERNELS_DEBUG=1` keeps debug information.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
TORCH_TARGET_VERSION = "0x020a000000000000"  # stable ABI of torch 2.10
CUDA_ARCHS = os.environ.get("SPPO_KERNELS_CUDA_ARCHS", "80;90;100").split(";")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
DEBUG = os.environ.get("SPPO_KERNELS_DEBUG") == "1"

_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-ffp-contract=fast"]
# A file whose name ends so is compiled for that instruction set and chosen at run time.
ISA_FLAGS = {
    "_avx512": [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    "_avx2": _AVX2,
}


def cuda_home() -> Path | None:
    """The CUDA toolkit to build with, or None; FORCE_CUDA=1 turns None into an error."""
    force = os.environ.get("FORCE_CUDA", "")
    if force == "0":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    for home in map(Path, filter(None, candidates)):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    if force == "1":
        raise RuntimeError("FORCE_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME")
    return None


def torch_paths() -> tuple[list[str], str] | None:
    """Include folders and library folder of the installed torch, or None without one."""
    try:
        import torch
    except ImportError:
        return None
    root = Path(torch.__file__).parent
    return [str(root / "include"), str(root / "include/torch/csrc/api/include")], str(root / "lib")


def pybind11_include() -> list[str]:
    """pybind11's own headers if it is installed; torch bundles a copy otherwise."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


class BuildNative(build_ext):
    """Compiles each source with the flags its name asks for, in parallel, CUDA through nvcc."""

    def run(self) -> None:
        if os.environ.get("SPPO_KERNELS_NATIVE") == "0":
            self._skip("SPPO_KERNELS_NATIVE=0 is set")
            return
        if torch_paths() is None:
            self._skip("torch is not importable in the build environment")
            return
        try:
            super().run()
        except Exception as error:
            if os.environ.get("FORCE_CUDA") == "1" or os.environ.get("SPPO_KERNELS_NATIVE") == "1":
                raise
            self._skip(f"{type(error).__name__}: {error}")

    def _skip(self, reason: str) -> None:
        self.extensions = []
        print(
            f"warning: sppo_kernels._C is not built ({reason}). The package works without it, "
            "slower. To build it: install torch and a C++17 compiler, then run "
            "`pip install --no-build-isolation .`",
            file=sys.stderr,
        )

    def build_extension(self, ext: Extension) -> None:
        include, lib = torch_paths()
        include = [str(CSRC), *pybind11_include(), *include]
        home = cuda_home()
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)

        cxx = list(self.compiler.compiler_so_cxx or self.compiler.compiler_so)
        flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fopenmp-simd"]
        flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-maybe-uninitialized"]
        flags += ["-g"] if DEBUG else ["-g0"]  # after Python's own -g
        defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DNDEBUG"]
        if home is not None:
            defines.append("-DSPPO_WITH_CUDA=1")
        sources = [CSRC / "bindings.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
        if home is not None:
            sources += sorted(CSRC.glob("cuda/*.cpp")) + sorted(CSRC.glob("cuda/*.cu"))

        def command(source: Path, target: Path) -> list[str]:
            if source.suffix == ".cu":
                gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
                last = CUDA_ARCHS[-1]
                gencode.append(f"-gencode=arch=compute_{last},code=compute_{last}")
                if source.stem.startswith("game"):
                    gencode.append("-fmad=false")
                return [
                    *(str(home / "bin" / "nvcc"), "-O3", "-std=c++17", f"-I{CSRC}", *gencode),
                    *("-Xfatbin", "-compress-all"),
                    *("-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"),
                    *("-c", str(source), "-o", str(target)),
                ]
            isa = [f for s, fs in ISA_FLAGS.items() if source.stem.endswith(s) for f in fs]
            isa = isa if IS_X86 else []
            if source.stem.startswith("game"):  # games give the same bits on every processor
                isa = [*isa, "-ffp-contract=off"]
            system = [f"-isystem{p}" for p in include[1:]] + self._python_include()
            cuda = [f"-isystem{home / 'include'}"] if source.parent.name == "cuda" else []
            return [
                *(*cxx, *flags, *isa, *defines, f"-I{CSRC}", *system, *cuda),
                *("-c", str(source), "-o", str(target)),
            ]

        jobs = []
        for source in sources:
            target = build / f"{source.parent.name}_{source.name}.o"
            job = command(source, target)
            folders = {"cuda": ("cuda", "game", "cpu"), "cpu": ("cpu", "game")}
            headers = [h for f in folders.get(source.parent.name, ("cpu",))
                       for h in (CSRC / f).glob("*.h")]  # fmt: skip
            newest = max(p.stat().st_mtime for p in (source, *headers))
            # The command is part of what an object depends on: other flags, another object.
            told = target.with_suffix(".command")
            same = told.exists() and told.read_text() == "\n".join(job)
            if self.force or not same or not target.exists() or target.stat().st_mtime < newest:
                jobs.append((job, told))
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for error in pool.map(self._compile_one, jobs):
                if error is not None:
                    raise RuntimeError(error)

        objects = [str(build / f"{s.parent.name}_{s.name}.o") for s in sources]
        link = ["-Wl,--no-as-needed"] if sys.platform.startswith("linux") else []
        link += ["-Wl,--strip-all"] if sys.platform.startswith("linux") and not DEBUG else []
        libraries, library_dirs = ["c10", "torch", "torch_cpu"], [lib]
        if home is not None:
            libraries += ["cudart_static", "dl", "rt", "pthread"]
            folders = ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
            library_dirs += [str(home / f) for f in folders if (home / f).exists()]
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(output),
            libraries=libraries,
            library_dirs=library_dirs,
            extra_preargs=link,
            target_lang="c++",
        )

    def _python_include(self) -> list[str]:
        return [f"-isystem{p}" for p in self.include_dirs]

    @staticmethod
    def _compile_one(job: tuple[list[str], Path]) -> str | None:
        command, told = job
        done = subprocess.run(command, capture_output=True, text=True)
        if done.stderr.strip():
            print(done.stderr, file=sys.stderr)
        if done.returncode:
            return f"`{' '.join(command)}` failed:\n{done.stderr}"
        told.write_text("\n".join(command))
        return None


setup(
    ext_modules=[Extension("sppo_kernels._C", sources=["csrc/bindings.cpp"])],
    cmdclass={"build_ext": BuildNative},
)

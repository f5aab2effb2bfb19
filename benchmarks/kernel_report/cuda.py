"""The kernels of csrc/cuda, compiled by nvcc to cubins; no GPU is needed or looked for."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.kernel_report.sass import Code, read

CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "kernel-report"
FLAGS = ("-O3", "-std=c++17", "-fmad=false")  # as setup.py compiles csrc/cuda/game*.cu


class NoCompiler(RuntimeError):
    """nvcc is not there."""


def nvcc() -> Path:
    """nvcc of $CUDA_HOME, of the path, or of /usr/local/cuda.

    Raises:
        NoCompiler: it is nowhere.
    """
    home = os.environ.get("CUDA_HOME")
    found = [f"{home}/bin/nvcc"] if home else []
    for path in (*found, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and Path(path).exists():
            return Path(path)
    raise NoCompiler("nvcc: not found in $CUDA_HOME, on the path or in /usr/local/cuda")


def nvcc_version() -> str:
    told = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", told)[1]


def sources() -> list[Path]:
    """The `.cu` files."""
    return sorted((CSRC / "cuda").glob("*.cu"))


@cache
def kernel_names() -> frozenset[str]:
    """Names of the __global__ functions in csrc/cuda."""
    pattern = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\("
    texts = [path.read_text() for path in sources()]
    return frozenset(name for text in texts for name in re.findall(pattern, text))


def _key(source: Path, target: int) -> str:
    files = [source, *sorted(CSRC.glob("cuda/*.h")), *sorted(CSRC.glob("game/*.h"))]
    text = "\n".join(f"{p.name}\n{p.read_text()}" for p in files)
    text += f"{FLAGS}{target}{nvcc_version()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cubin(source: Path, target: int) -> bytes:
    """Compile one file, or take what the same text, flags and compiler gave before (build/)."""
    kept = CACHE / f"{source.stem}-sm{target}-{_key(source, target)}.cubin"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        command = [nvcc(), *FLAGS, f"-I{CSRC}", f"-arch=sm_{target}", "-cubin", source]
        done = subprocess.run([*command, "-o", partial], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc on {source.name}, sm_{target}: {done.stderr.strip()}")
        partial.replace(kept)
    return kept.read_bytes()


def label(symbol: str) -> tuple[str, str]:
    """(kernel, template arguments in words) of a mangled name; dtypes as float32 and float64.

    Raises:
        ValueError: it is not an instance of a kernel of csrc/cuda.
    """
    names = "|".join(sorted(kernel_names(), key=len, reverse=True))
    found = re.search(rf"\d({names})I(\w*?)EEv", symbol)
    if not found:
        raise ValueError(f"not a kernel of csrc/cuda: {symbol!r}")
    words = []
    solver = re.search(r"4base\d+([A-Z][A-Za-z]+?)E", found[2] + "E")
    if solver:
        words.append(re.sub(r"(?<!^)([A-Z])", r" \1", solver[1]).lower())
    size = re.search(r"Li(\d+)E", found[2])
    if size:
        words.append(f"K = {size[1]}" if found[1].startswith("targets") else f"K <= {size[1]}")
    words.append({"f": "float32", "d": "float64"}[found[2][-1]])
    return found[1], ", ".join(words)


def compiled(targets: tuple[int, ...], processes: int = 2) -> Iterator[tuple[int, Code]]:
    """(target, code) of every kernel of csrc/cuda.

    Raises:
        NoCompiler: nvcc is not there.
        RuntimeError: nvcc refused a file.
    """
    nvcc()
    jobs = [(source, target) for target in targets for source in sources()]
    with ThreadPoolExecutor(processes) as pool:
        for (_, target), binary in zip(jobs, pool.map(lambda job: cubin(*job), jobs), strict=True):
            for code in read(binary):
                yield target, code


def available() -> bool:
    """Whether the cubins can be made and read here."""
    try:
        nvcc()
    except NoCompiler:
        return False
    return importlib.util.find_spec("triton") is not None

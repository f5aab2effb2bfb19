"""`sppo env`: what is installed, and which backend runs and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Sequence

import torch

import sppo_kernels
from sppo_kernels import backend

PACKAGES = (
    *("transformers", "accelerate", "datasets", "pyarrow", "peft", "triton", "flash-attn"),
    *("vllm", "trl", "matplotlib", "rich"),
)


def lines() -> list[tuple[str, str]]:
    """(name, value) of everything worth knowing in a bug report."""
    found = [
        ("sppo-kernels", sppo_kernels.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    device = "none"
    if torch.cuda.is_available():
        device = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    found.append(("CUDA devices", device))
    found.append(("CPU threads", str(torch.get_num_threads())))
    for kind in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            for impl in ("native", "triton"):
                why = backend.unavailable(impl, kind, dtype)
                name = f"{impl} on {kind}, {str(dtype).removeprefix('torch.')}"
                found.append((name, "runs" if why is None else f"no: {why}"))
    chosen = backend.resolve("auto", "cpu", torch.float32)
    found.append(("impl='auto' on cpu", chosen))
    if torch.cuda.is_available():
        found.append(("impl='auto' on cuda", backend.resolve("auto", "cuda", torch.bfloat16)))
    if backend.triton_error() is None:
        from sppo_kernels.logps.triton import tables

        found.append(("Triton block table", tables.in_use()))
    return found


def run(argv: Sequence[str]) -> None:
    if argv:
        print("usage: sppo env")
        return
    width = max(len(name) for name, _ in lines())
    for name, value in lines():
        print(f"{name:{width}}  {value}")

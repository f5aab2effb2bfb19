"""`sppo env`."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import sppo_kernels
from sppo_kernels import backend

PACKAGES = (
    *("transformers", "accelerate", "datasets", "pyarrow", "peft", "triton", "flash-attn"),
    *("vllm", "trl", "matplotlib", "rich"),
)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def lines() -> list[tuple[str, str]]:
    """(name, value) of everything worth knowing in a bug report."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = [
        ("sppo-kernels", sppo_kernels.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((name, version(name)) for name in PACKAGES),
        ("CUDA devices", ", ".join(devices) or "none"),
        ("CPU threads", str(torch.get_num_threads())),
    ]
    for kind in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            for impl in ("native", "triton"):
                why = backend.unavailable(impl, kind, dtype)
                name = f"{impl} on {kind}, {str(dtype).removeprefix('torch.')}"
                found.append((name, "runs" if why is None else f"no: {why}"))
    found.append(("impl='auto' on cpu", backend.resolve("auto", "cpu", torch.float32)))
    if devices:
        found.append(("impl='auto' on cuda", backend.resolve("auto", "cuda", torch.bfloat16)))
    if backend.triton_error() is None:
        from sppo_kernels.logps.triton import tables

        found.append(("Triton block table", tables.in_use()))
    return found


def run(argv: list[str]) -> None:
    """what is installed and which backend runs"""
    if argv:
        print("usage: sppo env")
        return
    found = lines()
    width = max(len(name) for name, _ in found)
    for name, value in found:
        print(f"{name:{width}}  {value}")

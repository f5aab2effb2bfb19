"""Seeds of every test; without a CUDA device Triton is interpreted and `gpu` tests are skipped."""

import getpass
import hashlib
import os
import random
import tempfile

import hypothesis
import pytest
import torch

# Its key leaves out the instruction set: graphs cached under another one compute wrong numbers.
ISA = f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), ISA))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

MOVED = os.environ.get("SPPO_KERNELS_SEED", "0")

# The same examples in every run; `SPPO_KERNELS_SEED` moves them, as it moves all other inputs.
hypothesis.settings.register_profile(
    "fixed", derandomize=MOVED == "0", database=None, deadline=None
)
hypothesis.settings.load_profile("fixed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if MOVED != "0":  # a derandomised example does not depend on any seed
        config.option.hypothesis_seed = MOVED


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and none is here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def seed(request) -> int:
    """Of the test's inputs: its name's, whatever its file, its order and its neighbours.

    `SPPO_KERNELS_SEED=n` gives every test other inputs; a failure names the n it came with.
    """
    name = f"{request.node.name} {MOVED}".encode()
    found = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")
    print(f"SPPO_KERNELS_SEED={MOVED} (seed={found})")
    return found


@pytest.fixture(autouse=True)
def _seeded(seed) -> None:
    """The global generators too, so that no test depends on which ran before it."""
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture
def generator(seed) -> torch.Generator:
    """Random inputs of a test, the same in every run."""
    return torch.Generator().manual_seed(seed)

"""The game code as compiled: sanitizers, CUDA without spills, instruction sets, no extension."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sppo_kernels.games.comparisons import aggregate
from sppo_kernels.games.solvers import bradley_terry, nash, regularized_nash, tournament
from sppo_kernels.games.targets import sppo_targets, symmetrize, win_rates
from tests.game_inputs import ROOT, needs_native, random_games, random_lengths, random_logits

CSRC = ROOT / "csrc"


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_game_headers_under_sanitizers(tmp_path, seed):
    binary = tmp_path / "test_game"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    built = run(["g++", *flags, str(ROOT / "tests/csrc/test_game.cpp"), "-o", str(binary)])
    assert built.returncode == 0, built.stderr
    done = run([str(binary), str(seed)], env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"})
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "0 failures" in done.stdout


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="needs nvcc: set CUDA_HOME or put it on PATH")
def test_cuda_games_compile_without_spills(tmp_path):
    """All kernels for sm_80, sm_90 and sm_100; a thread that plays a game may use local memory."""

    def compile_one(job):
        source, arch = job
        flags = ["-O3", "-std=c++17", f"-I{CSRC}", "-fmad=false", "-Xptxas", "-v"]
        target = tmp_path / f"{source.stem}_{arch}.cubin"
        command = [nvcc(), *flags, f"-arch=sm_{arch}", "-cubin", "-o", str(target), str(source)]
        return job, run(command)

    sources = [CSRC / "cuda/game_targets.cu", CSRC / "cuda/game_solvers.cu"]
    jobs = [(source, arch) for source in sources for arch in (80, 90, 100)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(compile_one, jobs))
    for (source, arch), done in results:
        assert done.returncode == 0, done.stderr
        entries = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            done.stderr,
        )
        assert len(entries) == len(frames) >= 16
        for name, (stack, stores, loads) in zip(entries, frames, strict=True):
            assert (stores, loads) == ("0", "0"), (source.name, arch, name)
            in_registers = "thread_kernel" not in name or "targets_thread_kernelILi5Ef" in name
            assert stack == "0" or not in_registers, (source.name, arch, name)


def digest(tensors) -> str:
    whole = hashlib.sha256()
    for t in tensors:
        whole.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def everything(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    results = []
    for k, dtype in ((5, torch.float32), (5, torch.float64), (11, torch.float32)):
        c = random_logits(generator, 45, k, dtype=dtype)
        lengths = random_lengths(generator, 45, k)
        p = symmetrize(c)
        results += [p, *nash(p), *bradley_terry(p), *tournament(p, lengths)]
        results += regularized_nash(p, tau=0.05, lengths=lengths)
        for options in ({}, {"preset": "uclaml"}, {"mode": "prob"}):
            results += sppo_targets(c, logits=True, lengths=lengths, **options)
    return results


@needs_native
def test_same_bits_on_every_instruction_set_and_thread_count(seed):
    code = (
        "import sys, torch; from tests.games.test_builds import digest, everything;"
        "torch.set_num_threads(int(sys.argv[2])); print(digest(everything(int(sys.argv[1]))))"
    )
    expected = digest(everything(seed))
    assert expected != digest(everything(seed + 1))
    for capability, threads in (("default", "1"), ("avx2", "3")):
        env = {**os.environ, "SPPO_KERNELS_CPU_CAPABILITY": capability}
        done = run([sys.executable, "-c", code, str(seed), threads], cwd=ROOT, env=env)
        assert done.stdout.strip() == expected, (capability, done.stderr)


def test_works_without_the_extension_and_says_so_once():
    code = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from sppo_kernels.games.comparisons import aggregate
from sppo_kernels.games import bradley_terry, nash, regularized_nash, tournament
from sppo_kernels.games.targets import select_pairs, sppo_targets, symmetrize, win_rates
p = symmetrize(torch.randn(3, 4, 4))
for _ in range(2):
    win_rates(p), sppo_targets(p), select_pairs(p, "score"), nash(p), regularized_nash(p)
    bradley_terry(p), tournament(p), aggregate([0, 1], [1, 2], [1.0, 0.5])
print("residual", float(nash(p).residual.max()) < 1e-10)
try:
    nash(p, impl="native")
except RuntimeError as error:
    print(error)
"""
    env = {**os.environ, "SPPO_KERNELS_NATIVE": "0"}
    done = run([sys.executable, "-c", code], cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert "residual True" in done.stdout
    assert "impl='native' cannot run here: SPPO_KERNELS_NATIVE=0" in done.stdout
    assert done.stderr.count("WARNING") == 1 and "slower" in done.stderr


@pytest.mark.gpu
@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 5, 8, 9, 16, 31, 32, 40])  # a thread; a warp; global memory
def test_cuda_gives_the_bits_of_the_cpu(generator, k, dtype):
    """Only +, -, *, / and comparisons in one order, no FMA: equality is exact."""
    c = random_logits(generator, 300, k, dtype=dtype)
    p = random_games(generator, 300, k, dtype=dtype)
    for lengths in (None, random_lengths(generator, 300, k)):

        def solve(c, p, lengths):
            yield symmetrize(c)
            yield win_rates(p, lengths, include_self=True)
            for options in ({}, {"preset": "uclaml"}, {"mode": "prob"}):
                yield from sppo_targets(c, logits=True, lengths=lengths, **options)
            yield from nash(p, lengths)
            yield from nash(p, lengths, method="mirror", max_iter=200)
            mu = torch.ones(k, dtype=torch.float64, device=p.device)  # log 1 = 0 on both
            yield from regularized_nash(p, mu, 0.05, lengths=lengths)
            yield from bradley_terry(p, lengths)
            yield from tournament(p, lengths)

        there = solve(c.cuda(), p.cuda(), None if lengths is None else lengths.cuda())
        for at, (a, b) in enumerate(zip(solve(c, p, lengths), there, strict=True)):
            assert torch.equal(a, b.cpu()), at


@pytest.mark.gpu
@needs_native
def test_cuda_aggregate_gives_the_bits_of_the_cpu(generator):
    n, games, k = 5000, 40, 35
    game = torch.randint(0, games, (n,), generator=generator)
    i = torch.randint(0, k, (n,), generator=generator)
    j = (i + torch.randint(1, k, (n,), generator=generator)) % k
    outcome, weight = torch.rand(2, n, generator=generator, dtype=torch.float64)
    here = aggregate(i, j, outcome, game=game, weight=weight)
    there = aggregate(i.cuda(), j.cuda(), outcome.cuda(), game=game.cuda(), weight=weight.cuda())
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b.cpu())

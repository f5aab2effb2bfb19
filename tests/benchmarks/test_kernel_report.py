"""The kernel report: cubins read right, limits and predictions by hand, no kernel without a row."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import kernels
from benchmarks.kernel_report import cuda, document, predict, sass

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "kernels.md"
needs_nvcc = pytest.mark.skipif(not cuda.available(), reason="needs nvcc")


def triton_kernels(folder):
    """Names of the Triton functions that are launched, which end in _kernel."""
    pattern = r"@triton\.jit[^\n]*\ndef (\w+_kernel)\("
    return {n for p in sorted(folder.glob("*.py")) for n in re.findall(pattern, p.read_text())}


def undocumented(names, text):
    return sorted(n for n in names if f"| {n} (" not in text)


def test_every_triton_kernel_has_a_case():
    found = triton_kernels(ROOT / "sppo_kernels" / "logps" / "triton")
    assert len(found) >= 7 and found == {c.kernel for c in kernels.cases()}
    text = DOCUMENT.read_text()
    assert not [c.label for c in kernels.cases() if text.count(f"| {c.label} | ") < 3]


def test_every_cuda_kernel_is_in_the_document():
    text = DOCUMENT.read_text()
    assert {"shared_kernel", "symmetrize_kernel"} <= cuda.kernel_names()
    assert not undocumented(cuda.kernel_names(), text)
    assert undocumented({"forgotten_kernel"}, text) == ["forgotten_kernel"]


def test_every_cuda_kernel_says_its_threads():
    """From the launch bounds the report knows the size of a block."""
    for path in cuda.sources():
        text = path.read_text()
        assert text.count("__global__") == text.count("__launch_bounds__")


def test_the_document_is_of_this_report():
    """Headers, shapes and words of the generator stand in the document; the rest is compiled."""
    text = DOCUMENT.read_text()
    for header in (document.STATIC, document.OF_CUDA, document.TIMES, document.WHOLE):
        assert "| " + " | ".join(header) + " |" in text
    small = document.small_rows(c.kernel for c in kernels.cases() if not c.sweeps)
    for row in small:
        assert "| " + " | ".join(row) + " |" in text
    predicted = {row[0] for row in small} | {"targets_thread_kernel"}
    predicted |= {c.kernel for c in kernels.cases() if c.sweeps}
    assert predicted == cuda.kernel_names() | {c.kernel for c in kernels.cases()}
    assert "measured nowhere" in text and "Nothing here was run on a GPU" in text
    whole = ("trainable head", "frozen head", "no gradient")
    for shape in predict.SHAPES:
        for name in whole:
            assert f"| {shape} | {name}" in text
        assert text.count(f"| {shape} | ") >= len(whole) + 2
    assert {str(s) for s in predict.SHAPES} == {
        "(8192, 4096, 128256)", "(8192, 896, 151936)", "(4096, 3584, 256000, softcap)",
        "(16384, 2048, 128256)",
    }  # fmt: skip


def test_predictions_are_for_the_blocks_that_are_compiled():
    """One compilation serves all shapes only while the launchers choose the same block."""
    compiled = {c.label: c for c in kernels.cases()}
    for shape in predict.SHAPES:
        for label in ("partial (bf16)", "backward (bf16)", "rows, gradient (bf16)",
                      "statistics, all (bf16)", "statistics, gradient (bf16)"):  # fmt: skip
            case = compiled[label]
            block = kernels.block_of(case.kernel, "bf16", shape.vocab)
            assert block == (case.constexprs["BLOCK"], case.num_warps)


SOURCE = """
__global__ void __launch_bounds__(96, 1) sample_kernel(const float4* x, float4* y, int n, int at) {
  __shared__ float s[96];
  float keep[64];
  const int i = blockIdx.x * 96 + threadIdx.x;
  float4 v = x[i];
  #pragma unroll 1
  for (int j = 0; j < 64; ++j) keep[(j * at) & 63] = v.x * j;
  s[threadIdx.x] = v.y;
  __syncthreads();
  v.x = exp2f(s[95 - threadIdx.x]) + __shfl_xor_sync(0xffffffffu, v.z, 1) + keep[at & 63];
  y[i] = v;
}
"""


@needs_nvcc
@pytest.mark.parametrize("target", [80, 90])
def test_a_cubin_is_read_right(target, tmp_path):
    """A kernel whose accesses, memory and threads are known."""
    (tmp_path / "a.cu").write_text(SOURCE)
    command = [cuda.nvcc(), "-O3", f"-arch=sm_{target}", "-cubin", "a.cu", "-o", "a.cubin"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (code,) = sass.read((tmp_path / "a.cubin").read_bytes())
    assert "sample_kernel" in code.symbol
    assert sass.widths(code, "LDG") == {128: 1} and sass.widths(code, "STG") == {128: 1}
    assert code.shared == 96 * 4, "without what the driver keeps"
    assert code.threads == 96
    assert code.stack >= 256 and code.count("LDL|STL") >= 2
    noted = {name: code.count(pattern) for name, pattern in sass.NOTED.items()}
    assert noted["EX2"] == 1 and noted["SHFL"] == 1 and noted["BAR"] == 1
    assert noted["MMA"] == 0 and noted["TMA, cp.async"] == 0


def test_widths_and_counts_by_hand():
    ops = ["LDG.E.128", "LDG.E.128.CONSTANT", "LDG.E.64", "LDG.E", "LDG.E.U16", "STG.E", "NOP",
           "LDGSTS.E.128"]  # fmt: skip
    code = sass.Code("k", 32, 0, 0, 32, ops, [])
    assert sass.widths(code, "LDG") == {128: 2, 64: 1, 32: 1, 16: 1}
    assert sass.widths(code, "STG") == {32: 1}
    assert code.count("LDGSTS") == 1 and sum(code.counts().values()) == 7


def _code(lines):
    text = [f"        /*{16 * i:04x}*/   {x} ;" if x[0] != "." else x for i, x in enumerate(lines)]
    return sass.Code("k", 1, 0, 0, 32, sass.instructions("\n".join(text)), text)


def test_a_sweep_is_the_loops_that_take_exponentials():
    loop = [".L_x_1:", "LDG.E.128 R1", "MUFU.EX2 R2, R1", "FADD R3, R2, R3",
            "@P0 BRA `(.L_x_2)", "FSEL R4, R4, R5, P1", ".L_x_2:", "@P2 BRA `(.L_x_1)"]  # fmt: skip
    other = [".L_x_3:", "STG.E R1", "@P2 BRA `(.L_x_3)", "EXIT"]
    found = sass.sweep(_code(["MOV R1, R2", *loop, *other]))
    assert found == Counter({"LDG.E.128": 1, "MUFU.EX2": 1, "FADD": 1, "BRA": 2}), "no FSEL"
    assert sass.sweep(_code(["MUFU.EX2 R1", "FADD R1", "NOP"])) == Counter(
        {"MUFU.EX2": 1, "FADD": 1}
    )


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared", "warps", "limit"),
    [
        (90, 8, 64, 0, 32, "registers"),
        (90, 32, 32, 0, 64, "threads"),
        (90, 4, 80, 16, 24, "registers"),  # 2560 registers a warp, six in each quarter
        (90, 1, 16, 0, 32, "blocks"),
        (90, 4, 32, 46 << 10, 16, "shared memory"),  # 4 blocks of 47 KiB in 228
        (80, 4, 32, 46 << 10, 12, "shared memory"),  # 3 in 164
        (90, 4, 33, 0, 48, "registers"),  # 33 are given out as 40
    ],
)
def test_occupancy_by_hand(target, num_warps, registers, shared, warps, limit):
    assert sass.occupancy(target, num_warps, registers, shared) == (warps, limit)


def test_a_block_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="registers"):
        sass.occupancy(90, 32, 128, 0)


def test_predictions_by_hand():
    counts = Counter({"FFMA": 2, "FADD": 1, "MUFU.EX2": 1, "FMNMX": 1})
    assert predict.arithmetic(counts) == 7
    device = predict.Device("d", 1, 1e9, (1e9, 2e9), 1e12, 1e6)
    found = predict.predict("s", "k", 1e6, 1.28e6, counts, device)
    assert found.memory == (0.5, 1.0)
    assert found.pipes["issue"] == pytest.approx(0.05)
    assert found.pipes["MUFU"] == pytest.approx(0.08)
    assert found.pipes["ALU"] == pytest.approx(0.02) and found.pipes["FP32"] == pytest.approx(0.03)
    assert found.ms == (0.5, 1.0) and found.bound == "memory"
    busy = predict.predict("s", "k", 1e4, 1.28e6, counts, device)
    assert busy.bound == "MUFU" and busy.ms == pytest.approx((0.08, 0.08))
    assert predict.moved_bytes(2, 10, 100, 2, 8) == 10 * (400 + 8)
    shape = predict.Shape(10, 100, 1000)
    total = predict.whole(shape, "trainable", 3, found, device)
    assert total.gemm_ms == pytest.approx(6e6 / 1e12 * 1e3)
    assert total.share[0] < total.share[1] < 0.1


def test_mangled_names_become_words():
    prefix = "_ZN4sppo4game54_GLOBAL__N__32c7e166_15_game_solvers_cu_3c904c2c_29205"
    name = prefix + "13shared_kernelINS0_4base12BradleyTerryELi32EdEEvNS0_10SolverArgsIT1_EE"
    assert cuda.label(name) == ("shared_kernel", "bradley terry, K <= 32, float64")
    name = prefix + "21targets_thread_kernelILi5EfEEvNS0_11TargetsArgsIT0_EE"
    assert cuda.label(name) == ("targets_thread_kernel", "K = 5, float32")
    with pytest.raises(ValueError, match="not a kernel"):
        cuda.label("_Z3foov")


def test_without_nvcc_the_command_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setattr(cuda.shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda.Path, "exists", lambda self: False)
    with pytest.raises(cuda.NoCompiler, match="nvcc: not found"):
        cuda.nvcc()


def test_the_document_is_not_written_without_the_cuda_kernels(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        kernels.main(["--triton-only", "--markdown", str(tmp_path / "k.md")])
    assert "CUDA kernels" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        kernels.main(["--triton-only"])
    assert "TRITON_INTERPRET" in capsys.readouterr().err

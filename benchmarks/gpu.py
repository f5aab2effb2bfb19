"""Everything that needs a GPU, in one command without network: build, test, measure, report.

    python -m benchmarks.gpu --out FOLDER [--budget 480]

Works with the machine's own Python, torch and triton. Peers that are not installed are named in the
table. Stops by itself within the budget: cases run in order of importance, each in a process of its
own, and what did not fit is listed. FOLDER gets core.json, table.md, tests.xml and log.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import ROOT, Result, environment, write_json
from benchmarks.render import markdown

# rows, hidden size, vocabulary, groups, dtype: the most important first
PLAN = [
    ((8192, 4096, 128256), ("trainable", "frozen", "forward"), "bfloat16"),
    ((8192, 4096, 128256), ("logits", "logits-forward"), "bfloat16"),
    ((8192, 896, 151936), ("trainable", "frozen"), "bfloat16"),
    ((16384, 2048, 128256), ("trainable",), "bfloat16"),
    ((4096, 3584, 256000), ("trainable",), "bfloat16"),
]
TEST_SHARE = 0.4  # of the budget, at most


def gpu_test_files() -> list[str]:
    """Test files with tests for a GPU: the others may import what a GPU machine lacks."""
    files = [*sorted(ROOT.glob("tests/test_*.py")), ROOT / "benchmarks/test_bench_games.py"]
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]


class Runner:
    """Runs commands within the budget and keeps what they print."""

    def __init__(self, out: Path, budget: float) -> None:
        self.end = time.monotonic() + budget
        self.log = (out / "log.txt").open("w", encoding="utf-8")

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, command: list[str], limit: float) -> int | None:
        """The exit status; None when the time was up."""
        self.log.write(f"$ {' '.join(command)}\n")
        self.log.flush()
        try:
            return subprocess.run(
                command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT,
                timeout=max(1.0, min(limit, self.left())), check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            self.log.write("(time was up)\n")
            return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here", file=sys.stderr)
        return 2
    out = args.out.resolve()
    runner, summary = Runner(out, args.budget), []
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("SPPO_KERNELS_CUDA_ARCHS", f"{major}{minor}")
    built = runner.run([sys.executable, "setup.py", "build_ext", "--inplace"], args.budget / 4)
    summary.append(f"build: {'ok' if built == 0 else f'failed ({built})'}")
    tests = runner.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
         f"--junitxml={out / 'tests.xml'}", *gpu_test_files()],
        args.budget * TEST_SHARE,
    )  # fmt: skip
    summary.append(f"tests marked gpu: {'passed' if tests == 0 else f'failed ({tests})'}")
    results: list[Result] = []
    for number, (case, groups, dtype) in enumerate(PLAN):
        part = out / f"part{number}.json"
        status = runner.run(
            [sys.executable, "-m", "benchmarks.core", "--case", *map(str, case),
             "--groups", *groups, "--dtypes", dtype, "--repeats", "7", "--json", str(part)],
            runner.left(),
        )  # fmt: skip
        if status != 0 or not part.exists():
            summary.append(f"not measured: {case} {groups} ({status})")
            continue
        rows = json.loads(part.read_text())["results"]
        results += [Result(**{k: v for k, v in row.items() if k != "median"}) for row in rows]
        part.unlink()
        write_json(out / "core.json", results, environment())
    table = markdown(results)
    (out / "table.md").write_text("\n".join(summary) + "\n\n" + table)
    print("\n".join(summary))
    print("\n".join(table.splitlines()[:50]))
    return 0 if built == 0 and tests == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

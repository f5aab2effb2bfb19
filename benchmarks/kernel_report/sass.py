"""What is in a cubin: registers, stack and shared memory, and the instructions of each kernel.

Limits of a multiprocessor and the lanes of its pipes are those of NVIDIA's CUDA C++ programming
guide for compute capability 8.0, 9.0 and 10.0.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

RESERVED_SHARED = 1024  # bytes of shared memory that the driver keeps of every block, from sm_80 on
SM_WARPS, SM_BLOCKS, SM_REGISTERS = 64, 32, 65536
SM_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}


@dataclass
class Code:
    """One kernel of a cubin."""

    symbol: str
    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes a block that the code declares, without the driver's own
    threads: int | None  # of a block, at most, where the code says so
    opcodes: list[str]
    lines: list[str]

    def counts(self) -> Counter[str]:
        return Counter(op for op in self.opcodes if op != "NOP")

    def count(self, pattern: str) -> int:
        return sum(n for op, n in self.counts().items() if re.match(pattern, op))


# Instructions of note: column, what its opcode looks like.
NOTED = {
    "LDG": r"LDG",
    "STG": r"STG",
    "EX2": r"MUFU\.EX2",
    "LG2": r"MUFU\.LG2",
    "RCP": r"MUFU\.R",
    "FFMA": r"FFMA|FFMA2",
    "DFMA": r"DFMA|DADD|DMUL",
    "SHFL": r"SHFL|REDUX|CREDUX",
    "BAR": r"BAR|WARPSYNC",
    "atomics": r"ATOM|RED\.",
    "MMA": r"HMMA|IMMA|DMMA|QGMMA|HGMMA|UTCHMMA|UTCQMMA",
    "TMA, cp.async": r"UTMA|UBLKCP|LDGSTS",
}


def widths(code: Code, kind: str) -> dict[int, int]:
    """Bits of a thread's access -> instructions, for `kind` "LDG" or "STG"."""
    found: Counter[int] = Counter()
    for op, n in code.counts().items():
        if re.match(kind + r"(\.|$)", op):
            bits = re.search(r"\.(256|128|64|U16|S16|16|U8|S8|8)(\.|$)", op)
            found[int(re.sub(r"\D", "", bits[1])) if bits else 32] += n
    return dict(sorted(found.items(), reverse=True))


def instructions(text: str) -> list[str]:
    """Opcodes of a disassembly, in order."""
    return [m[1] for m in map(_INSTRUCTION.match, text.splitlines()) if m]


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def sweep(code: Code) -> Counter[str]:
    """Instructions of the loops that take exponentials; of everything when there is none.

    What a forward branch skips counts only if it takes exponentials, or loads or stores: in these
    kernels the rest is the label's element, which one tile of a row has to see to.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []  # where, to which label
    for line in code.lines:
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(opcodes)
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump:
            jumps.append((len(opcodes), jump[1]))
        opcodes.append(found[1])
    skipped: set[int] = set()
    for at, name in jumps:
        region = opcodes[at + 1 : labels[name]]
        if region and not any(re.match(r"MUFU|LD|ST|SHFL|BAR|EXIT|BRA", op) for op in region):
            skipped.update(range(at + 1, labels[name]))
    loops: Counter[str] = Counter()
    for at, name in jumps:
        body = range(labels[name], at + 1)
        if any(opcodes[i] == "MUFU.EX2" for i in body):
            loops.update(opcodes[i] for i in body if i not in skipped)
    if not loops:
        loops.update(op for i, op in enumerate(opcodes) if i not in skipped and op != "NOP")
    return loops


# Pipes that take fewer than 128 lanes an SM and cycle, by how an opcode begins (Hopper).
PIPES = {
    "MUFU": (r"MUFU|F2F\.|I2F|F2I", 16),
    "FP64": (r"DFMA|DADD|DMUL|DSETP", 64),
    "ALU": (
        r"FMNMX|FSETP|FSEL|FSET|ISETP|IADD|LOP3|PRMT|SHF|SEL|LEA|IMNMX|VIMNMX|F2FP|VABS|PLOP3|P2R",
        64,
    ),
}


def pipe_cycles(counts: Counter[str]) -> dict[str, float]:
    """Cycles of an SM that one thread's instructions take of each pipe, and of issue."""
    cycles = dict.fromkeys(PIPES, 0.0)
    for op, n in counts.items():
        for name, (pattern, lanes) in PIPES.items():
            if re.match(pattern, op):
                cycles[name] += n / lanes
    fp32 = sum(n for op, n in counts.items() if re.match(r"FADD|FMUL|FFMA|IMAD", op))
    cycles["FP32"] = fp32 / 128
    cycles["issue"] = sum(n for op, n in counts.items() if op != "NOP") / 128
    return cycles


def occupancy(target: int, num_warps: int, registers: int, shared: int) -> tuple[int, str]:
    """Warps that an SM holds, and the resource that runs out first.

    Args:
        num_warps: of a block.
        registers: of a thread. shared: bytes of a block.

    Raises:
        ValueError: not even one block fits.
    """
    a_warp = -(-registers * 32 // 256) * 256  # registers are given out 256 at a time
    held = SM_REGISTERS // 4 // a_warp * 4  # each quarter of an SM has its own registers
    blocks = {  # where several run out at once, the first named: those no kernel can help
        "threads": SM_WARPS // num_warps,
        "blocks": SM_BLOCKS,
        "registers": held // num_warps,
        "shared memory": SM_SHARED[target] // (shared + RESERVED_SHARED),
    }
    limit = min(blocks, key=blocks.get)
    if blocks[limit] == 0:
        raise ValueError(f"no block of {num_warps} warps fits an SM of sm_{target}: {limit}")
    return blocks[limit] * num_warps, limit


def tools() -> Path:
    """cuobjdump and nvdisasm, as Triton ships them."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def read(cubin: bytes) -> list[Code]:
    """Every kernel of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tools() / "cuobjdump", "-res-usage", path], **run).stdout
        text = subprocess.run([tools() / "nvdisasm", path], **run).stdout
    named = re.search(r"\.target\s+sm_(\d+)|EF_CUDA_SM(\d+)", text)
    target = int(named[1] or named[2])
    bodies, threads = _sections(text)
    found = []
    pattern = r"Function (\S+?):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for symbol, registers, stack, shared in re.findall(pattern, usage):
        body = bodies[symbol]
        own = int(shared)
        if target >= 90 and own >= RESERVED_SHARED:  # there the driver's part is in the figure
            own -= RESERVED_SHARED
        most = threads.get(symbol)
        ops = instructions("\n".join(body))
        found.append(Code(symbol, int(registers), int(stack), own, most, ops, body))
    return found


def _sections(text: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Lines of each kernel's code, and the most threads of a block that each declares."""
    bodies: dict[str, list[str]] = {}
    threads: dict[str, int] = {}
    lines: list[str] = []
    section, wanted = "", False
    for line in text.splitlines():
        begins = re.match(r'^\s*\.section\s+"?([^",\s]+)', line)
        if begins:
            section, wanted = begins[1], False
            is_code = section.startswith(".text.")
            lines = bodies.setdefault(section[6:], []) if is_code else []
        if "nvinfo : " in line:
            wanted = bool(re.search(r"EIATTR_(MAX_THREADS|REQNTID)", line))
        word = re.search(r"\.word\s+(0x[0-9a-f]+)", line) if wanted else None
        if word:
            threads[section.removeprefix(".nv.info.")] = int(word[1], 16)
            wanted = False
        lines.append(line)
    return bodies, threads

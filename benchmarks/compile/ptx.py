"""Parsers of PTX, of the output of ptxas -v, and of XLA's list of launches."""

import collections
import dataclasses
import re
import subprocess
from typing import Any

from kernels import aot

_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(", re.MULTILINE)
_MATRIX = re.compile(
    r"\b(mma\.sync|wgmma\.mma_async\.sync)\.aligned\.(m\d+n\d+k\d+)((?:\.[a-z]\w*)+)"
)
_LOAD = re.compile(r"\bld\.(?:\w+\.)*?global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\b[^;]*?\],\s*(?:\[[^]]*\],\s*)?(\w+)")
_PTXAS = {
    "spill_stores": re.compile(r"(\d+) bytes spill stores"),
    "spill_loads": re.compile(r"(\d+) bytes spill loads"),
    "registers": re.compile(r"Used (\d+) registers"),
    "static_shared": re.compile(r"(\d+) bytes smem"),
}
_LAUNCH = re.compile(
    r"kCustomKernel .*\] (\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\] "
    r" *shared_memory: (\d+) bytes"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Grid, threads and shared memory of a kernel's launch."""

    grid: tuple[int, int, int]
    threads: int  # of one program
    dynamic_shared: int  # bytes of one program


def entry(text: str) -> str | None:
    """Return the name of the kernel in a PTX text; None if it holds none."""
    found = _ENTRY.search(text)
    return found[1] if found else None


def matrix_instructions(text: str) -> dict[str, int]:
    """Count the matrix instructions in a PTX text, by kind, shape and type of their inputs.

    The keys read "mma m16n8k16 bf16" (from sm_80 on) and "wgmma m64n64k16 bf16" (sm_90a). Each
    counts once, however often its loop runs.
    """
    counts = collections.Counter()
    for kind, shape, suffix in _MATRIX.findall(text):
        types = [part for part in suffix.split(".") if part in ("bf16", "f16", "tf32", "f32")]
        # mma names the types of d, a, b and c; wgmma those of d, a and b.
        counts[f"{kind.split('.')[0]} {shape} {types[1]}"] += 1
    return dict(counts)


def global_loads(text: str) -> dict[int, int]:
    """Count the loads from global memory in a PTX text, by the bytes that one thread reads."""
    counts = collections.Counter()
    for vector, bits in _LOAD.findall(text):
        counts[int(vector or 1) * int(bits) // 8] += 1
    for size in _COPY.findall(text):
        counts[int(size, 0)] += 1
    return dict(sorted(counts.items(), reverse=True))


def parse_ptxas(text: str) -> dict[str, int]:
    """Read what `ptxas -v` printed about one kernel: registers per thread, bytes of the rest.

    It knows the shared memory that the PTX declares with a size (static), not what the launch adds.
    """
    found = {name: pattern.search(text) for name, pattern in _PTXAS.items()}
    if found["registers"] is None:
        raise ValueError(f"ptxas said nothing of registers: {text.strip()[-200:]}")
    return {name: int(match[1]) if match else 0 for name, match in found.items()}


def run_ptxas(path: str, text: str) -> dict[str, int]:
    """Assemble a PTX file for the architecture that it names, and read what ptxas says of it."""
    target = _TARGET.search(text)
    assert target is not None, path
    command = [aot.ptxas(), "-v", f"-arch={target[1]}", path, "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse_ptxas(done.stderr)


def launches(thunk_sequence: str) -> dict[str, Launch]:
    """Read the launches of kernels from XLA's dump of a program's steps (thunk_sequence.txt)."""
    found: dict[str, Launch] = {}
    for name, *numbers in _LAUNCH.findall(thunk_sequence):
        x, y, z, *threads, shared = map(int, numbers)
        found[name] = Launch(
            grid=(x, y, z), threads=threads[0] * threads[1] * threads[2], dynamic_shared=shared
        )
    return found


def describe(path: str, text: str) -> dict[str, Any]:
    """Return what a kernel's PTX and ptxas tell, as JSON holds it."""
    return {
        "name": entry(text),
        **run_ptxas(path, text),
        "matrix_instructions": matrix_instructions(text),
        "global_loads": {str(size): count for size, count in global_loads(text).items()},
    }

"""How many programs of a kernel a GPU core can hold at once.

A core (streaming multiprocessor) starts programs as long as it has registers (in four parts, each
with warps of its own), shared memory and threads left for one more:

    warps with registers   = 4 * (core's registers / 4 // round_up(32 * registers per thread, 256))
    shared memory          = round_up(static + dynamic + 1 KiB for the system, 128)
    programs at once       = min(warps with registers // program's warps,
                                 core's shared memory // program's,
                                 core's threads // program's, 32)
    occupancy              = programs at once * threads / core's threads

The core's limits are those of kernels/gpu_targets; the units in which they are given out (CUDA's
occupancy calculator, compute capability 8.0 and 9.0) and the limit of 32 programs are not in those
files. What is reserved for the system is: the difference of a core's and a program's shared memory.
"""

import dataclasses
import re

from kernels.aot import Target, description
from kernels.gpu import A100, H200, Gpu

_GPUS: dict[Target, Gpu] = {"a100": A100, "h200": H200}

_WARP = 32
_PARTS = 4  # of a core
_REGISTER_UNIT = 256  # per warp
_SHARED_UNIT = 128
_MOST_PROGRAMS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one core of a GPU has."""

    registers: int
    shared_memory: int
    shared_memory_per_program: int
    threads: int
    gpu: Gpu


def limits(target: Target) -> Limits:
    """Read the limits of a GPU."""
    text = description(target)

    def number(name: str) -> int:
        return int(re.search(rf"^\s*{name}: (\d+)$", text, re.MULTILINE)[1])

    return Limits(
        registers=number("registers_per_core_limit"),
        shared_memory=number("shared_memory_per_core"),
        shared_memory_per_program=number("shared_memory_per_block_optin"),
        threads=number("threads_per_core_limit"),
        gpu=_GPUS[target],
    )


def programs_at_once(limit: Limits, *, registers: int, shared_memory: int, threads: int) -> int:
    """Return how many programs one core can hold.

    Args:
      limit: of the core.
      registers: per thread.
      shared_memory: bytes of one program, static and dynamic.
      threads: of one program.
    """
    warps = -(-threads // _WARP)
    per_warp = _round_up(_WARP * registers, _REGISTER_UNIT)
    reserved = limit.shared_memory - limit.shared_memory_per_program
    return min(
        _PARTS * (limit.registers // _PARTS // per_warp) // warps,
        limit.shared_memory // _round_up(shared_memory + reserved, _SHARED_UNIT),
        limit.threads // (warps * _WARP),
        _MOST_PROGRAMS,
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

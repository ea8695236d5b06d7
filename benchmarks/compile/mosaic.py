"""One case compiled through Mosaic for an H200 and an H100; a job of kernels.aot_process."""

import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.compile import ptx
from duo_jax.reports import markdown
from kernels import aot, gpu
from kernels.all_cases import CASES, served_by_mosaic
from kernels.errors import UnsupportedError

_SUFFIX = "_mosaic_gpu_kernel"  # that jax adds to a kernel's name
_THREADS = re.compile(r"^\.maxntid (\d+)", re.MULTILINE)
_SHARED = re.compile(r"smem_scratch_bytes=(\d+)")
_TMA = {
    "loads": re.compile(r"\bcp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global\b"),
    "stores": re.compile(r"\bcp\.async\.bulk\.tensor\.\dd\.global\.shared::\w+\b"),
}
# Of one core (streaming multiprocessor) of compute capability 9.0.
_REGISTERS, _MOST_THREADS = 65_536, 2_048


def cases() -> list[tuple[str, str]]:
    """Return op and name of the cases that Mosaic kernels serve."""
    return [
        (op, name) for op in CASES for name, case in CASES[op].items() if served_by_mosaic(case)
    ]


def compared() -> dict[str, str]:
    """Return the case of each op that is compiled for an H100 too: its first of real size."""
    return {
        op: next(name for other, name in cases() if other == op and CASES[op][name].compile_only)
        for op in dict.fromkeys(op for op, _ in cases())
    }


def compile_case(op: str, name: str, dump: str, target: aot.Target = "h200") -> dict[str, Any]:
    """Compile one case and describe its kernel, as JSON holds it.

    A process must not have compiled the case before, for any GPU: jax would not compile it again.

    Args:
      op: of kernels.all_cases.
      name: of the case.
      dump: a folder that is emptied.
      target: the GPU.

    Returns:
      The error if there was one, the kernels, and a hash of their PTX.
    """
    os.environ["MOSAIC_GPU_DUMP_TO"] = dump
    folder, case = pathlib.Path(dump), CASES[op][name]
    run = functools.partial(case.run, implementation="mosaic")
    for left in folder.iterdir():
        left.unlink()
    error = None
    try:
        aot.compile_lowered(aot.lower_for(target, run, *case.shapes()))
    except (UnsupportedError, RuntimeError, ValueError) as raised:
        error = str(raised).strip().splitlines()[0]
    ptx_text = b"".join(file.read_bytes() for file in sorted(folder.glob("*.ptx")))
    return {
        "error": error,
        "kernels": list(_kernels(folder)),
        "ptx": hashlib.sha256(ptx_text).hexdigest(),
    }


def _kernels(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*.ptx")):
        text = file.read_text(encoding="utf-8")
        said = ptx.run_ptxas(str(file), text)
        threads = _number(_THREADS, text)
        shared = _number(_SHARED, file.with_suffix(".resources.txt").read_text(encoding="utf-8"))
        yield {
            "name": (ptx.entry(text) or "").removesuffix(_SUFFIX),
            **said,
            "threads": threads,
            "dynamic_shared": shared,
            "programs_per_core": _programs(said["registers"] * threads, shared, threads),
            "matrix_instructions": ptx.matrix_instructions(text),
            "tma": {name: len(pattern.findall(text)) for name, pattern in _TMA.items()},
        }


def _programs(registers: int, shared: int, threads: int) -> int:
    """Return how many programs a core holds at once."""
    return min(
        _REGISTERS // registers,
        gpu.H200.shared_memory // (shared + gpu.RESERVED),
        _MOST_THREADS // threads,
    )


def _number(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    assert found is not None, pattern.pattern
    return int(found[1])


def to_markdown(result: dict[str, Any]) -> str:
    """Write docs/kernels_mosaic.md."""
    rows, kernels = result["rows"], [k for row in result["rows"] for k in row["kernels"]]
    spilling = sum(bool(k["spill_stores"] or k["spill_loads"]) for k in kernels)
    failed = [f"- Not compiled: {r['op']}, {r['case']}: {r['error']}" for r in rows if r["error"]]
    parts = [
        _INTRODUCTION.format(
            command=result["command"],
            minutes=result["run_minutes"],
            jax=result["jax"],
            ptxas=result["ptxas"],
            passed=len(rows) - len(failed),
            cases=len(rows),
            kernels=len(kernels),
            spilling=spilling,
            h100=_of_h100(rows),
        ),
        *failed,
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        lines = [
            [row["case"], *_cells(kernel)]
            for row in rows
            if row["op"] == op
            for kernel in row["kernels"]
        ]
        parts += [f"## {op}\n", markdown.table(_HEADER, lines) + "\n"]
    return "\n".join(parts)


def _of_h100(rows: list[dict[str, Any]]) -> str:
    same = [row["same_for_h100"] for row in rows if row["same_for_h100"] is not None]
    return (
        f"An H100 takes the same sm_90a code: {sum(same)} of {len(same)} cases, one of each op, "
        "compiled\nfor both, have the same PTX to the byte."
    )


_INTRODUCTION = """\
# Mosaic kernels: what the compilers say

This file is written by `{command}`, on any machine, with or without a GPU; it took {minutes}
minutes with jax {jax}, its CUDA plugin and ptxas {ptxas}. Do not edit it.
**Nothing here was executed: no number is a speed.** What a GPU did with the kernels:
[GPU](gpu.md#speed).

`implementation="mosaic"` runs these kernels for Hopper.
They do the forward pass of decoding, of prefill at an offset, of streaming and of full attention,
in bfloat16 and float16, for a head_dim of 64, 80, 96 and 128, from caches in rows or pages;
decoding takes int8 caches of head_dim 64, 96 and 128, int4 and int2 ones of 64 and 128. Gradients,
float32 and other head_dims stay with Triton and XLA, and so does the A100: asked for them, Mosaic
refuses by name.
They need jax 0.11, which needs Python 3.12. With jax 0.12 the tests run them on a CPU against
float64, in jax's interpreter, with race detection (`tests/kernels/test_mosaic.py`).

Bytes and FLOPs of a case are those of [the Triton kernels' page](kernels.md): both are counted from
the case, whichever kernel does it. {passed} of {cases} cases compiled for an H200. They hold
{kernels} kernels; {spilling} of these spill registers. {h100}

For the A100 there is no Mosaic kernel. jax's Mosaic has the instructions (`plgpu.mma`, cp.async),
but no kernel of them could be checked here, for two reasons, each with the shortest program that
shows it, with jax 0.12.0.1:

- The interpreter has no rule for `mma`. This ends in "MLIR translation rule for primitive 'mma' not
  found for platform cpu":

  ```text
  import jax
  import jax.numpy as jnp
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def body(out):
      a, b = jnp.ones((64, 16), jnp.bfloat16), jnp.ones((16, 8), jnp.bfloat16)
      out[...] = plgpu.mma(jnp.zeros((64, 8), jnp.float32), a, b)

  shape = jax.ShapeDtypeStruct((64, 8), jnp.float32)
  plgpu.kernel(body, out_type=shape, interpret=plgpu.InterpretGPUParams())()
  ```

- Ahead of time, every described GPU is compiled for as a Hopper
  (`jax.experimental.mosaic.gpu.utils._infer_arch` returns (9, 0) for a device without
  `compute_capability`). For an A100 any kernel then ends the process, in "LLVM
  ERROR: Cannot select: intrinsic %llvm.nvvm.elect.sync". With that function made to return (8, 0),
  a kernel around one `mma` does compile, to `mma.sync.aligned.m16n8k16` for sm_80.

  ```text
  import jax
  import jax.numpy as jnp
  from jax.experimental.pallas import mosaic_gpu as plgpu
  import kernels.aot

  # from jax.experimental.mosaic.gpu import utils; utils._infer_arch = lambda: (8, 0)
  def body(a, out):
      out[...] = a[...] + 1

  shape = jax.ShapeDtypeStruct((128,), jnp.float32)
  kernels.aot.compile_for("a100", plgpu.kernel(body, out_type=shape), shape)
  ```

- regs: registers per thread at the start; warpgroups then give some to one another. spills: bytes
  per thread, stores + loads.
- shared KiB: of one program. programs: that a core holds at once, by registers and shared memory.
- TMA: bulk tensor copies in the PTX, loads + stores. Loops count once there, and so do the matrix
  instructions.
"""
_HEADER = (
    "case", "kernel", "threads", "regs", "spills", "shared KiB", "programs", "TMA",
    "matrix instructions",
)  # fmt: skip


def _cells(kernel: dict[str, Any]) -> list[str]:
    counts = sorted(kernel["matrix_instructions"].items())
    return [
        kernel["name"],
        f"{kernel['threads']}",
        f"{kernel['registers']}",
        f"{kernel['spill_stores'] + kernel['spill_loads']}",
        f"{kernel['dynamic_shared'] / 1024:.0f}",
        f"{kernel['programs_per_core']}",
        f"{kernel['tma']['loads']} + {kernel['tma']['stores']}",
        ", ".join(f"{count} {name}" for name, count in counts) or "none",
    ]

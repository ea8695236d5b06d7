"""docs/kernels.md: the tables of a run of benchmarks.compiled."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.compile import roofline
from duo_jax.reports import markdown
from kernels import aot
from kernels.gpu import GPUS

_GPUS: dict[aot.Target, str] = {
    "a100": "A100 (sm_80)",
    "h100": "H100 (sm_90a)",
    "h200": "H200 (sm_90a)",
}
_INTRODUCTION = """\
# Kernels: what the compilers say

This file is written by `{command}`, on any machine, with or without a GPU;
it took {minutes} minutes with jax {jax}, its CUDA plugin and ptxas {ptxas}. Do not edit it.
**Nothing here was executed: no number is a speed.** What a GPU did with the kernels:
[GPU](gpu.md#speed).

{summary}

There are two parts: how every kernel came out of the compilers, and how fast the cases of real size
could be at best. The cases are those of `kernels/*/cases.py`; the tests run the small ones.
"""
_KERNELS = """\
## How the kernels came out

Each case is compiled for both GPUs with spilled registers made an error. A case whose row is in
bold did not compile so; where spilling was the reason, it was compiled again with spilling allowed,
and the row shows how it came out. XLA's own small steps around a kernel are left out.

- kernel: its name in a profile. `duo_decode`, `duo_prefill`, `duo_streaming` (forward); for
  gradients `duo_streaming_dq`, `_dkv` (of keys in the window), `_dsink` (of the sinks' keys).
  Full attention is done by `duo_prefill` too, its gradients by `duo_full_dq` and `_dkv`;
  `duo_merge` merges parts of attention.
  `duo_decode_packed` reads keys and values in 8, 4 and 2 bits; prefill unpacks them first.
- tile: queries x keys per step; `n x 64`: all query heads of a group, padded to at least 16; of a
  merge, parts x channels.
- warps: of 32 threads, in one program. stages: tiles on their way from memory at once.
- programs: in the whole grid.
- regs: registers per thread, of at most 255. spills: bytes per thread that did not fit into them,
  stores + loads.
- shared KiB: shared memory of one program, static (ptxas says) and dynamic (XLA's launch says).
- matrix instructions: their number in the PTX (a loop's body counts once), shape, and type of their
  inputs; tf32 is float32 with 10 bits of mantissa.
- global loads: bytes per thread x their number in the PTX. 16 bytes is the widest there is; the
  narrow ones are for lengths, lse and the like.
"""
_ROOFLINE = """\
## How fast they could be at best

Counted, not measured: the least that any kernel moves and multiplies. Inputs and outputs count
once, and of (query, key) pairs only the visible ones; for gradients, the forward pass and then the
backward pass, which reads all of it again. Our kernels multiply whole tiles, masked pairs included:
a test counts that they walk exactly the tiles that hold a visible pair.

The floor is the longer of these bytes at full bandwidth and these operations at full rate, from
data sheets (dense bfloat16, memory), which no kernel reaches:

{sheets}
"""
_KERNEL_HEADER = (
    "case", "kernel", "tile", "warps", "stages", "programs", "regs", "spills", "shared KiB",
    "matrix instructions", "global loads",
)  # fmt: skip


def summary(result: dict[str, Any]) -> str:
    """Say how many cases compiled, and which did not."""
    rows = result["rows"]
    kernels = [kernel for row in rows for kernel in row["kernels"]]
    failed = [row for row in rows if row["error"] is not None]
    spilling = [k for k in kernels if k["spill_stores"] or k["spill_loads"]]
    compiled = len(rows) - len(failed)
    lines = [
        f"{compiled} of {len(rows)} compilations (cases x GPUs) passed; they hold {len(kernels)} "
        f"kernels, of which {len(spilling)} spill registers."
    ]
    lines += [
        f"- Not compiled: {row['op']}, {row['case']}, {_GPUS[row['target']]}: {row['error']}"
        for row in failed
    ]
    return "\n".join(lines)


def to_markdown(result: dict[str, Any]) -> str:
    """Write the whole document."""
    sheets = "\n".join(
        f"- {name.upper()}: {(GPUS[name].flops or 0) / 1e12:,.0f} TFLOP/s, "
        f"{(GPUS[name].bandwidth or 0) / 1e9:,.0f} GB/s"
        for name in roofline.SHOWN
    )
    parts = [
        _INTRODUCTION.format(
            command=result["command"],
            minutes=result["run_minutes"],
            jax=result["jax"],
            ptxas=result["ptxas"],
            summary=summary(result),
        ),
        _KERNELS,
    ]
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        parts.append(f"### {op}\n")
        for target, title in _GPUS.items():
            rows = [r for r in result["rows"] if (r["op"], r["target"]) == (op, target)]
            if rows:
                parts += [
                    f"{title}, real sizes\n",
                    _kernel_table(r for r in rows if r["real_size"]),
                ]
                small = _kernel_table(r for r in rows if not r["real_size"])
                parts.append(
                    f"<details><summary>{title}, small cases of the tests</summary>\n\n{small}\n"
                    "</details>\n"
                )
    parts += [_ROOFLINE.format(sheets=sheets), _roofline_table(result["roofline"])]
    return "\n".join(parts)


def _kernel_table(rows: Iterator[dict[str, Any]]) -> str:
    lines = [line for row in rows for line in _kernel_lines(row)]
    return markdown.table(_KERNEL_HEADER, lines) + "\n"


def _kernel_lines(row: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a line per kernel; the case's name stands in the first only."""
    case = f"**{row['case']}: does not compile**" if row["error"] else row["case"]
    if not row["kernels"]:
        yield [case] + ["-"] * (len(_KERNEL_HEADER) - 1)
    for index, kernel in enumerate(row["kernels"]):
        sizes = kernel["block_sizes"]
        known = kernel["grid"] is not None
        yield [
            "" if index else case,
            kernel["name"],
            _tile(sizes),
            f"{sizes['num_warps']}",
            f"{sizes['num_stages']}",
            f"{_product(kernel['grid']):,}" if known else "?",
            f"{kernel['registers']}",
            f"{kernel['spill_stores'] + kernel['spill_loads']}",
            f"{_shared(kernel) / 1024:.0f}" if known else "?",
            _counts(kernel["matrix_instructions"]) or "none",
            ", ".join(f"{size} B x {n}" for size, n in kernel["global_loads"].items()),
        ]


def _tile(sizes: dict[str, int]) -> str:
    if "block_parts" in sizes:
        return f"{sizes['block_parts']} x {sizes['block_columns']}"
    return f"{sizes.get('block_q', 'n')} x {sizes['block_kv']}"


def _roofline_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["case", "GFLOP", "MB", *(f"{name.upper()} floor" for name in roofline.SHOWN)]
    lines = [
        [
            f"{row['op']}: {row['case']}",
            _number(row["flops"] / 1e9),
            _number(row["num_bytes"] / 1e6),
            *(_floor(row["floors"][name]) for name in roofline.SHOWN),
        ]
        for row in rows
    ]
    return markdown.table(header, lines) + "\n"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _shared(kernel: dict[str, Any]) -> int:
    return kernel["static_shared"] + kernel["dynamic_shared"]


def _product(grid: Sequence[int]) -> int:
    return grid[0] * grid[1] * grid[2]


def _number(value: float) -> str:
    """Write a number with three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _floor(floor: dict[str, Any]) -> str:
    seconds = floor["seconds"]
    time = f"{_number(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{_number(seconds * 1e6)} us"
    return f"{time}, {floor['bound']}"

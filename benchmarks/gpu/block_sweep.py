"""The stage that tries other tile sizes, and writes the best ones as JSON.

Its file is for a person to read: a configuration that wins here goes into the kernel's config.py.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax

from benchmarks.gpu import arrays, timers
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table, reason
from kernels import compat
from kernels.case import Case
from kernels.decode import config as decode_config
from kernels.decode.cases import DecodeCase
from kernels.full.cases import FullCase
from kernels.gpu import Gpu
from kernels.merge import config as merge_config
from kernels.merge.cases import MergeCase
from kernels.packed import Packed
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import StreamingCase
from kernels.tiles import BlockSizes, cdiv

_FEW_BYTES = 50_000_000  # a call that moves less is shorter than its dispatch
_MIN_GAIN = 1.02  # less is the spread of two measurements


def _tiles(tiles: Iterable[tuple[int, int, int]], stages: Iterable[int]) -> list[BlockSizes]:
    return [
        BlockSizes(block_q=block_q, block_kv=block_kv, num_warps=num_warps, num_stages=num_stages)
        for (block_q, block_kv, num_warps), num_stages in itertools.product(tiles, stages)
    ]


# For queries that walk all earlier keys, and for windows and gradients.
_LONG_WALKS = _tiles(
    ((128, 64, 8), (128, 64, 4), (64, 64, 4), (128, 128, 8), (128, 32, 4), (64, 128, 4)), (3, 2, 4)
)
_SHORT_WALKS = _tiles(
    ((64, 64, 4), (64, 32, 4), (128, 64, 8), (64, 64, 8), (128, 32, 4), (32, 32, 4)), (2, 3, 1)
)


def run(settings: Settings, table: Table) -> None:
    """Time the candidates of every real-size case; each has an equal part of the time."""
    table.notes = {
        "copy_to": "the config.py that holds the kernel's sizes, where `gain` is worth it"
    }
    cases = settings.timed_cases()
    for left, (name, (op, case)) in zip(
        range(len(cases), 0, -1), table.in_time(cases), strict=False
    ):
        end = table.time_left * (1 - 1 / left)
        sweep = functools.partial(_sweep, settings, case, table, end)
        row = table.attempt(name, sweep)
        if row is not None:
            table.add(name=name, op=op, dtype=case.dtype, **row)


def candidates(case: Case, *, gpu: Gpu) -> list[Any]:
    """Return tile sizes to try; the op's own choice is the first."""
    chosen = case.block_sizes(gpu=gpu)
    if isinstance(case, DecodeCase):
        programs = len(case.lengths) * case.kv_heads
        found = [
            decode_config.BlockSizes(
                block_kv=block_kv,
                num_splits=max(
                    1, min(cdiv(waves * gpu.num_cores, programs), cdiv(case.slots, block_kv))
                ),
                num_warps=num_warps,
                num_stages=num_stages,
            )
            for waves, (block_kv, num_warps), num_stages in itertools.product(
                (4, 2, 8, 16), ((64, 4), (128, 4), (32, 2), (128, 8), (32, 4)), (3, 2, 4)
            )
        ]
    elif isinstance(case, PrefillCase):
        found = _LONG_WALKS
    elif isinstance(case, FullCase | StreamingCase):
        part = "backward" if case.gradient else "forward"
        found = [
            dataclasses.replace(chosen, **{part: sizes})
            for sizes in (
                _LONG_WALKS if part == "forward" and isinstance(case, FullCase) else _SHORT_WALKS
            )
        ]
    elif isinstance(case, MergeCase):
        found = [
            merge_config.BlockSizes(
                block_rows=block_rows, num_warps=num_warps, num_stages=num_stages
            )
            for (block_rows, num_warps), num_stages in itertools.product(
                ((1, 1), (1, 4), (2, 1), (4, 4), (16, 4), (16, 8)), (3, 1)
            )
        ]
    else:
        found = []
    if any(isinstance(x, Packed) for x in case.shapes()):
        # 2 bits take tiles of up to 32 tokens, of which a block's words hold two.
        found = [sizes for sizes in found if sizes.block_kv in (chosen.block_kv, 32)]
    # Those that differ little from the choice come first: time may not do for all.
    return sorted(dict.fromkeys([chosen, *found]), key=lambda sizes: _differences(sizes, chosen))


def _differences(sizes: Any, chosen: Any) -> int:
    if not dataclasses.is_dataclass(sizes):
        return int(sizes != chosen)
    names = [field.name for field in dataclasses.fields(sizes)]
    return sum(_differences(getattr(sizes, name), getattr(chosen, name)) for name in names)


def _sweep(settings: Settings, case: Case, table: Table, end: float) -> dict[str, Any]:
    """Time candidates until `end` seconds of the stage are left."""
    arguments = arrays.draw(case, 0)
    shapes = jax.eval_shape(lambda *tree: tree, *arguments)
    tried: list[dict[str, Any]] = []
    gpu = compat.tile_gpu()
    found = candidates(case, gpu=gpu)[: 2 if settings.smoke else None]
    loops = timers.LOOPS if case.cost(gpu=gpu).num_bytes < _FEW_BYTES else 1

    def compiled(sizes):
        function = functools.partial(
            case.run, implementation=settings.implementation, block_sizes=sizes
        )
        return timers.compiled(function, *shapes, loops=loops)

    with concurrent.futures.ThreadPoolExecutor(settings.threads) as pool:
        for first in range(0, len(found), settings.threads):
            if tried and table.time_left < end:
                break
            some = found[first : first + settings.threads]
            programs = [pool.submit(compiled, sizes) for sizes in some]
            # Nothing is timed while others compile: they would hold up its dispatch.
            concurrent.futures.wait(programs, timeout=max(1.0, table.time_left))
            for sizes, program in zip(some, programs, strict=True):
                row: dict[str, Any] = {"sizes": dataclasses.asdict(sizes)}
                try:
                    time = timers.of_program(
                        program.result(timeout=0.1),
                        *arguments,
                        seconds=settings.seconds_per_candidate,
                        loops=loops,
                        rounds=3,
                    )
                    row["seconds"] = time["median"]
                except Exception as error:  # does not compile, or does not fit
                    row["failed"] = reason(error)
                tried.append(row)
        pool.shutdown(cancel_futures=True)  # nothing compiles beside what is timed later
    timed = [row for row in tried if "seconds" in row]
    best = min(timed, key=lambda row: row["seconds"], default=None)
    default = tried[0]
    result: dict[str, Any] = {
        "case": dataclasses.asdict(case),
        "default": default,
        "best": best,
        "not_tried": len(found) - len(tried),
        "candidates": tried,
    }
    if best and "seconds" in default:
        result["gain"] = default["seconds"] / best["seconds"]
        result["worth_it"] = result["gain"] >= _MIN_GAIN
    return result

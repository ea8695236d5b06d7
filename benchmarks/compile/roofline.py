"""How fast the cases of real size could be at best: counted, not measured.

A call takes at least as long as its bytes need at the GPU's memory bandwidth, and at least as long
as its operations need at its matrix units' rate. Both come from data sheets: dense bfloat16, with
no kernel ever reaching them. The counts are those of kernels.case.Cost.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.compile import occupancy
from kernels.all_cases import CASES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a data sheet says."""

    name: str
    flops: float  # dense bfloat16 operations per second
    bandwidth: float  # bytes per second


GPUS = (
    Gpu(name="A100-80G", flops=312e12, bandwidth=2039e9),
    Gpu(name="H100 SXM", flops=989e12, bandwidth=3350e9),
    Gpu(name="H200", flops=989e12, bandwidth=4800e9),
)
_SCHEDULED_FOR = "a100"  # whose number of cores decides how decode splits its keys


def rows(ops: Sequence[str]) -> list[dict[str, Any]]:
    """Count every case of real size, all of which are bfloat16."""
    gpu = occupancy.limits(_SCHEDULED_FOR).gpu
    found = []
    for op in ops:
        for name, case in CASES[op].items():
            if case.compile_only:
                cost = case.cost(gpu=gpu)
                floors = {each.name: floor(each, cost.flops, cost.num_bytes) for each in GPUS}
                found.append({"op": op, "case": name, **dataclasses.asdict(cost), "floors": floors})
    return found


def floor(gpu: Gpu, flops: float, num_bytes: float) -> dict[str, Any]:
    """Return the least seconds of a call, and which of the two bounds it."""
    compute, memory = flops / gpu.flops, num_bytes / gpu.bandwidth
    return {
        "seconds": max(compute, memory),
        "bound": "compute" if compute > memory else "memory",
    }

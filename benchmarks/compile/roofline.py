"""Floors of time of the cases of real size: counted, not measured.

A call takes at least as long as its bytes need at the GPU's memory bandwidth, and at least as long
as its operations need at its matrix units' rate. Both come from data sheets (kernels.gpu): dense
bfloat16, with no kernel ever reaching them. The counts are those of kernels.case.Cost.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kernels.all_cases import CASES
from kernels.gpu import GPUS, Gpu

SHOWN = ("a100-80g", "h100-80g", "h200")


def rows(ops: Sequence[str]) -> list[dict[str, Any]]:
    """Count every case of real size, all of which are bfloat16."""
    found = []
    for op in ops:
        for name, case in CASES[op].items():
            if case.compile_only:
                cost = case.cost()
                floors = {gpu: floor(GPUS[gpu], cost.flops, cost.num_bytes) for gpu in SHOWN}
                found.append({"op": op, "case": name, **dataclasses.asdict(cost), "floors": floors})
    return found


def floor(gpu: Gpu, flops: float, num_bytes: float) -> dict[str, Any]:
    """Return the least seconds of a call, and which of the two bounds it."""
    assert gpu.flops is not None
    assert gpu.bandwidth is not None
    compute, memory = flops / gpu.flops, num_bytes / gpu.bandwidth
    return {
        "seconds": max(compute, memory),
        "bound": "compute" if compute > memory else "memory",
    }

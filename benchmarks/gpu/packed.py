"""How much faster decode attention reads caches in few bits than in bfloat16."""

import dataclasses

from benchmarks.gpu.settings import DECODE_500K, packed_name
from benchmarks.gpu.tables import Table
from kernels.cached_case import LAYOUTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedup:
    """One format against bfloat16, the same heads and tokens."""

    bits: int
    seconds: float
    speedup: float
    floor: float  # the ratio of their bytes


def speedups(tables: dict[str, Table]) -> list[Speedup]:
    """Return what the kernels stage has measured."""
    rows = tables["kernels"].rows if "kernels" in tables else []
    timed = {row["name"]: row for row in rows if "seconds" in row}
    plain = timed.get(f"decode: {DECODE_500K}")
    if plain is None:
        return []
    found = []
    for bits in LAYOUTS:
        row = timed.get(f"decode_packed: {packed_name(bits)}")
        if row is not None:
            seconds = row["seconds"]["median"]
            found.append(
                Speedup(
                    bits=bits,
                    seconds=seconds,
                    speedup=plain["seconds"]["median"] / seconds,
                    floor=plain["bytes"] / row["bytes"],
                )
            )
    return found

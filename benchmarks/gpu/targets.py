"""The targets of the project's kernels on an A100 or H200, and whether a run met them."""

import dataclasses
from typing import Any

from benchmarks.gpu.models import LLAMA_2_7B, LLAMA_3_8B, Headline
from benchmarks.gpu.settings import DECODE_500K, FULL_32K, STREAMING_32K, packed_name
from benchmarks.gpu.tables import Table, incomplete_ops
from kernels.cached_case import LAYOUTS
from kernels.gpu import Gpu

_LONG = 10_000_000  # bytes: decode cases that read less are bound by their launch
_OF_FLOOR = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Something to reach."""

    what: str
    goal: float
    value: float | None
    judged: bool = True  # False: the number is reported only
    unit: str = "x"

    @property
    def status(self) -> str:
        """Return "met", "not met", "not measured" or "reported"."""
        if self.value is None:
            return "not measured"
        if not self.judged:
            return "reported"
        return "met" if self.value >= self.goal else "not met"

    def line(self) -> str:
        """Say it in one line."""
        value = "-" if self.value is None else f"{self.value:.3g}{self.unit}"
        return f"{self.status:>12}  {value:>8}  (goal {self.goal:.3g}{self.unit})  {self.what}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return dataclasses.asdict(self) | {"status": self.status}


def judge(tables: dict[str, Table], *, hardware: str) -> list[Target]:
    """Compare a run with the targets.

    Args:
      tables: by stage; stages that did not run are missing.
      hardware: the GPU's name: cuDNN has kernels for Hopper that the Triton lowering cannot match,
        so there the ratio is reported and not judged.
    """
    rows = [row for row in _rows(tables, "kernels") if "op" in row]
    kernels = {row["name"]: row for row in rows if "seconds" in row}
    decode = [row for row in rows if row["op"] == "decode" and row["bytes"] > _LONG]
    full, streaming = (
        kernels.get(name) for name in (f"prefill: {FULL_32K}", f"streaming: {STREAMING_32K}")
    )
    cudnn = (full or {}).get("rivals", {}).get("jax.nn cudnn", {})
    by_mosaic = {row["name"]: row.get("mosaic", {}) for row in rows}
    mosaic_full = by_mosaic.get(f"prefill: {FULL_32K}", {}).get("flops_per_second")
    not_reached = tables["kernels"].not_reached if "kernels" in tables else []
    lost = "decode" in incomplete_ops(_rows(tables, "kernels"), not_reached)
    found = [
        Target(
            what="decode attention, fraction of the measured copy bandwidth (slowest long case)",
            goal=0.85,
            value=None if lost else _slowest(decode),
            unit="",
        ),
        Target(
            what="full prefill of 32K, speed against cuDNN",
            goal=1.0,
            value=cudnn.get("ours_is_faster_by"),
            judged="A100" in hardware,
        ),
        Target(
            what="streaming prefill of 32K against full",
            goal=10.0,
            value=full["seconds"]["median"] / streaming["seconds"]["median"]
            if full and streaming
            else None,
        ),
        Target(
            what="decode attention at 500K, int4 KV against bf16",
            goal=2.5,
            value=next((x.speedup for x in packed_speedups(tables) if x.bits == 4), None),
        ),
    ]
    if Gpu(kind=hardware, num_cores=1).is_hopper:
        found += [
            Target(
                what="Mosaic: decode attention, fraction of the measured copy bandwidth (likewise)",
                goal=0.9,
                value=None if lost else _slowest([by_mosaic[row["name"]] for row in decode]),
                unit="",
            ),
            Target(
                what="Mosaic: full prefill of 32K",
                goal=450.0,
                value=None if mosaic_full is None else mosaic_full / 1e12,
                unit=" TFLOP/s",
            ),
        ]
    for model in (LLAMA_2_7B, LLAMA_3_8B):
        for headline in model.headlines:
            found += _of_headline(headline, _rows(tables, "serving"))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSpeedup:
    """Decode attention from a cache in few bits against bfloat16, the same heads and tokens."""

    bits: int
    seconds: float
    speedup: float
    floor: float  # the ratio of their bytes


def packed_speedups(tables: dict[str, Table]) -> list[PackedSpeedup]:
    """Return those that the kernels stage has measured."""
    timed = {row["name"]: row for row in _rows(tables, "kernels") if "seconds" in row}
    plain = timed.get(f"decode: {DECODE_500K}")
    if plain is None:
        return []
    found = []
    for bits in LAYOUTS:
        row = timed.get(f"decode_packed: {packed_name(bits)}")
        if row is not None:
            seconds = row["seconds"]["median"]
            found.append(
                PackedSpeedup(
                    bits=bits,
                    seconds=seconds,
                    speedup=plain["seconds"]["median"] / seconds,
                    floor=plain["bytes"] / row["bytes"],
                )
            )
    return found


def _slowest(timed: list[dict[str, Any]]) -> float | None:
    """Return the smallest fraction of the copy bandwidth; None unless every case has one."""
    if not timed or any("of_ceiling" not in row for row in timed):
        return None
    return min(row["of_ceiling"]["copy"] for row in timed)


def _of_headline(headline: Headline, rows: list[dict[str, Any]]) -> list[Target]:
    row = headline.row(rows)
    where = f"{headline.model}, {headline.what} at {headline.tokens:,}: speed-up"
    return [
        Target(
            what=f"{where} (published {headline.published:.2f}x)",
            goal=headline.goal,
            value=None if row is None else row["speedup"],
        ),
        Target(
            what=f"{where} over that of its floor",
            goal=_OF_FLOOR,
            value=None if row is None else row["speedup"] / row["floor_speedup"],
            unit="",
        ),
    ]


def _rows(tables: dict[str, Table], stage: str) -> list[dict[str, Any]]:
    return tables[stage].rows if stage in tables else []

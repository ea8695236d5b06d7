"""The last lines of a run: what passed, what was measured, which targets were met."""

from benchmarks.gpu import ceilings
from benchmarks.gpu.models import DECODE, PREFILL
from benchmarks.gpu.tables import Table
from benchmarks.gpu.targets import Target, packed_speedups

_MAX_LINES = 40
_WIDTH = 160


def lines(tables: dict[str, Table], targets: list[Target], *, title: str) -> list[str]:
    """Write the summary; targets come last, and whole."""
    head = [title, *_stages(tables), *_checks(tables), *_ceilings(tables)]
    tail = ["targets:", *(f"  {target.line()}" for target in targets)]
    middle = [*_packed(tables), *_serving(tables)]
    room = _MAX_LINES - len(head) - len(tail)
    return [line[:_WIDTH] for line in (*head[: _MAX_LINES - len(tail)], *middle[:room], *tail)]


def _stages(tables: dict[str, Table]) -> list[str]:
    found = []
    for table in tables.values():
        failed = sum("failed" in row for row in table.rows)
        parts = [table.status, f"{len(table.rows)} rows"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"not reached: {len(table.not_reached)}"] if table.not_reached else []
        parts += [f"does not fit: {len(table.does_not_fit)}"] if table.does_not_fit else []
        found.append(f"stage {table.name}: {', '.join(parts)}")
    return found


def _checks(tables: dict[str, Table]) -> list[str]:
    found = []
    for stage, table in tables.items():
        if "checks" not in stage:
            continue
        bad = [row["name"] for row in table.rows if not row.get("passed")]
        found.append(
            f"{stage}: {len(table.rows) - len(bad)} passed, {len(bad)} failed, "
            f"{len(table.not_reached)} not reached (seed {table.notes.get('seed')})"
        )
        found += [f"  failed: {name}" for name in bad[:6]]
    return found or ["checks: not run"]


def _ceilings(tables: dict[str, Table]) -> list[str]:
    flops, num_bytes = ceilings.of(tables)
    if flops is None or num_bytes is None:
        return []
    return [f"ceilings: {flops / 1e12:,.3g} TFLOP/s, {num_bytes / 1e9:,.3g} GB/s copied"]


def _packed(tables: dict[str, Table]) -> list[str]:
    return [
        f"decode attention at 500K, int{x.bits} KV: {1e3 * x.seconds:.4g} ms, "
        f"{x.speedup:.2f}x bf16 (floor {x.floor:.2f}x)"
        for x in packed_speedups(tables)
    ]


def _serving(tables: dict[str, Table]) -> list[str]:
    found = []
    for what, axis, unit, key in (
        (DECODE, "context", "ms/token", "ms"),
        (PREFILL, "length", "s", "seconds"),
    ):
        for row in tables["serving"].rows if "serving" in tables else []:
            if row.get("what") != what or "speedup" not in row:
                continue
            published, memory = row.get("published_speedup"), row.get("memory_ratio")
            found.append(
                f"{what} {row['model']} at {row[axis]:,}: duo {row[key]['median']:.4g} {unit}, "
                f"{row['speedup']:.2f}x (floor {row['floor_speedup']:.2f}x"
                + (f", published {published:.2f}x)" if published else ")")
                + (f", memory {memory:.2f}x less" if memory else "")
            )
    return found

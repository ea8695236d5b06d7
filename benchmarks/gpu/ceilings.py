"""Ceilings of this device, measured: a large matrix product, and a large copy."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.gpu import timers
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table


def run(settings: Settings, table: Table) -> None:
    """Measure both; the others' fractions are of these."""
    size, dtype = settings.matmul_size, jnp.dtype(settings.dtype)
    a, b = (
        jax.random.normal(key, (size, size), dtype)
        for key in jax.random.split(jax.random.key(0), 2)
    )
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    time = timers.seconds_per_call(lambda: product(a, b), seconds=settings.seconds_per_row)
    table.add(
        name="matmul",
        what=f"{size:,}^3, random {dtype.name}",
        seconds=time,
        flops_per_second=2 * size**3 / time["median"],
    )
    del a, b

    source = jax.random.bits(jax.random.key(1), (settings.copy_bytes // 4,), jnp.uint32)
    # A sum with a number that is not known when compiling: a plain copy could be left out.
    copy = jax.jit(lambda x, one: x ^ one).lower(source, jnp.uint32(1)).compile()
    call = functools.partial(copy, source, jnp.uint32(1))
    time = timers.seconds_per_call(call, seconds=settings.seconds_per_row)
    table.add(
        name="copy",
        what=f"{source.nbytes:,} bytes, counted as read and as written",
        seconds=time,
        bytes_per_second=2 * source.nbytes / time["median"],
    )


def of(tables: dict[str, Table]) -> tuple[float | None, float | None]:
    """Return operations and bytes per second, where measured."""
    rows = tables["ceilings"].rows if "ceilings" in tables else []
    values = {row["name"]: row for row in rows}
    return (
        values.get("matmul", {}).get("flops_per_second"),
        values.get("copy", {}).get("bytes_per_second"),
    )

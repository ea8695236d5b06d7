"""Time of a decode step, and of a message between devices, on one device and on several.

    python -m benchmarks.mesh_speed --devices 1 2 8 --contexts 100000 1000000

A model of random weights with the shape of Llama-3-8B, and its published pattern at 50%, decodes
after a context of zeros. Beside each time stands the least one: the bytes of weights and caches on
each device, read once at the GPU's bandwidth. The message is a sum of 16 kB over all devices, as
two of a layer's four. It was tried on devices of a CPU only, whose times mean nothing.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from benchmarks import command
from benchmarks.gpu.models import LLAMA_3_8B
from duo_jax import files, serve
from duo_jax.cache import init_cache, with_lengths
from duo_jax.errors import InputError
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh import devices
from duo_jax.mesh.devices import MODEL
from duo_jax.reports import machine, markdown
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count
from duo_jax.serve.ahead_of_time import held_shapes, tree_bytes
from kernels.gpu import GPUS

_SIZE = 8192  # numbers of a message
_MESSAGES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpeedFlags:
    """Flags of the benchmark."""

    devices: tuple[Count, ...] = (1, 2, 4, 8)
    """Numbers of devices; those that are not there are left out."""
    contexts: tuple[Count, ...] = (100_000, 500_000)
    """Tokens in the cache."""
    layers: Count = 32
    """Layers of the model, from the first on."""
    steps: Count = 20
    """Timed steps; the median counts."""
    dtype: str = "bfloat16"
    """Type of weights and caches."""
    out: pathlib.Path = pathlib.Path("runs/mesh_speed")
    """Where to write .json and .md."""

    def __post_init__(self) -> None:
        check_fields(self)


def main(flags: MeshSpeedFlags) -> None:
    """Measure, print the table, and write it."""
    numbers = [n for n in flags.devices if n <= len(jax.devices())]
    if not numbers:
        raise InputError(f"there are {len(jax.devices())} devices")
    config = shortened(flags.layers)
    rows = [row for number in numbers for row in measure(flags, config, number)]
    result = {"command": machine.command("benchmarks.mesh_speed"), **machine.environment()}
    result |= {"rows": rows}
    files.make_folder(flags.out.parent)
    files.write_text(flags.out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    files.write_text(flags.out.with_suffix(".md"), to_markdown(rows) + "\n")
    print(to_markdown(rows))


def shortened(layers: int) -> DuoConfig:
    """Return the model with fewer layers."""
    config = LLAMA_3_8B.variants[0].config
    counts = config.retrieval_counts[:layers]
    architecture = dataclasses.replace(config.architecture, num_layers=len(counts))
    return dataclasses.replace(config, architecture=architecture, retrieval_counts=counts)


def measure(flags: MeshSpeedFlags, config: DuoConfig, number: int) -> list[dict[str, Any]]:
    """Return a row for each context, on so many devices."""
    mesh = devices.mesh_of(config.architecture, number)
    max_len = max(flags.contexts) + 2 + flags.steps
    sizes: dict[str, Any] = {"batch_size": 1, "max_len": max_len, "dtype": jnp.dtype(flags.dtype)}
    shapes, _ = held_shapes(config, mesh=mesh, **sizes)
    params = jax.tree.map(_random, shapes)
    step = jax.jit(functools.partial(serve.decode, config), donate_argnums=1)
    cache, token, rows = init_cache(config, **sizes, mesh=mesh), jnp.zeros(1, jnp.int32), []
    kind = jax.devices()[0].device_kind
    bandwidth = next((gpu.bandwidth for gpu in GPUS.values() if gpu.kind == kind), None)
    for context in flags.contexts:
        cache = with_lengths(cache, jnp.array([context], jnp.int32))
        seconds = []
        for _ in range(2 + flags.steps):
            began = time.perf_counter()
            logits, cache = step(params, cache, token)
            logits.block_until_ready()
            seconds.append(time.perf_counter() - began)
        longer: dict[str, Any] = sizes | {"max_len": context}
        held = held_shapes(config, mesh=mesh, **longer)
        rows.append(
            {
                "devices": number,
                "context": context,
                "ms": 1e3 * float(np.median(seconds[2:])),
                "bytes": tree_bytes(held),
                "floor_ms": None if bandwidth is None else 1e3 * tree_bytes(held) / bandwidth,
                "message_us": None if mesh is None else 1e6 * message_seconds(mesh),
            }
        )
    return rows


def _random(shape: jax.ShapeDtypeStruct) -> jax.Array:
    draw = functools.partial(jax.random.normal, shape=shape.shape, dtype=shape.dtype)
    scaled = jax.jit(lambda key: draw(key) * shape.dtype.type(0.02), out_shardings=shape.sharding)
    return scaled(jax.random.key(0))


def message_seconds(mesh: Mesh) -> float:
    """Return the seconds of a sum over all devices, one after another in one program."""

    def sums(x: jax.Array) -> jax.Array:
        scale = jnp.asarray(1 / mesh.size, x.dtype)
        return jax.lax.fori_loop(0, _MESSAGES, lambda _, x: jax.lax.psum(x, MODEL) * scale, x)

    everywhere = PartitionSpec()
    program = jax.jit(
        jax.shard_map(sums, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    )
    numbers = jnp.ones(_SIZE, jnp.bfloat16)
    program(numbers).block_until_ready()
    began = time.perf_counter()
    program(numbers).block_until_ready()
    return (time.perf_counter() - began) / _MESSAGES


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table."""

    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return markdown.table(
        ("devices", "context", "ms a token", "least ms", "GB a device", "a message, us"),
        [
            (
                str(row["devices"]),
                f"{row['context']:,}",
                shown(row["ms"], 2),
                shown(row["floor_ms"], 2),
                shown(row["bytes"] / 1e9, 2),
                shown(row["message_us"], 1),
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    command.run(main, MeshSpeedFlags)

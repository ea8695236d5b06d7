"""Serving programs compiled ahead of time for a described GPU, to learn how much memory they need.

Nothing is allocated or executed, and no weights are read; kernels.aot says what must be installed.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from duo_jax import serve
from duo_jax.cache import Cache, KVFormat, cache_shapes, stripes
from duo_jax.heads import split
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh import weights as mesh_weights
from duo_jax.mesh.devices import DATA, MODEL, AnyMesh
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_weights import WeightFormat, quantised_shapes
from duo_jax.serve import rows
from kernels import aot


def param_shapes(
    architecture: ModelConfig, dtype: DTypeLike, *, weights: WeightFormat = "model"
) -> Any:
    """Return the shapes of a model's parameters in serving form; `weights` as in duo_jax.load.

    All layers have the shapes of one: only one is traced.
    """
    one = dataclasses.replace(architecture, num_layers=1)
    heads = np.ones((1, architecture.num_kv_heads), bool)
    init = functools.partial(llama.init_params, one, dtype=jnp.dtype(dtype))
    params = jax.eval_shape(init, jax.random.key(0))
    params = jax.eval_shape(functools.partial(split.split_params, one, heads=heads), params)
    shapes = quantised_shapes(params, weights)
    return {**shapes, "layers": shapes["layers"] * architecture.num_layers}


def tree_bytes(tree: Any) -> int:
    """Return the bytes of arrays, or of shapes, on a GPU, where jax packs two int4 to a byte.

    Of shapes that say where they lie on a mesh, these are the bytes on each of its GPUs.
    """

    def size(leaf: Any) -> int:
        where = getattr(leaf, "sharding", None)
        shape = leaf.shape if where is None else where.shard_shape(leaf.shape)
        values = math.prod(shape)
        return values // 2 if leaf.dtype == jnp.int4 else values * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def described_mesh(target: aot.Target, devices: int) -> Mesh | None:
    """Return so many GPUs, which need not be here, as duo_jax.mesh.devices does; None of one."""
    return None if devices == 1 else aot.mesh(target, (1, devices), (DATA, MODEL))


def held_shapes(
    config: DuoConfig,
    *,
    mesh: AnyMesh | None,
    dtype: DTypeLike = jnp.bfloat16,
    weights: WeightFormat = "model",
    **sizes: Any,
) -> tuple[Any, Cache]:
    """Return the shapes of parameters and cache, which say where they lie on a mesh."""
    params = param_shapes(config.architecture, dtype, weights=weights)
    cache = cache_shapes(config, dtype=dtype, mesh=mesh, **sizes)
    if mesh is None:
        return params, cache
    return (
        placed(params, mesh_weights.shardings(mesh, params)),
        placed(cache, stripes.shardings(mesh, cache)),
    )


def placed(shapes: Any, shardings: Any) -> Any:
    """Return shapes that say where they lie."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )


def decode_step(
    config: DuoConfig,
    *,
    target: aot.Target,
    max_len: int,
    batch_size: int = 1,
    dtype: DTypeLike = jnp.bfloat16,
    weights: WeightFormat = "model",
    kv: KVFormat = "model",
    devices: int = 1,
) -> jax.stages.Compiled:
    """Compile one decode step with caches of `max_len` tokens, which are updated in place."""

    def step(params, cache, tokens):
        return serve.decode(config, params, cache, tokens, implementation="triton")

    tokens = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    mesh = described_mesh(target, devices)
    sizes = {"batch_size": batch_size, "max_len": max_len, "dtype": dtype, "kv": kv}
    params, cache = held_shapes(config, mesh=mesh, weights=weights, **sizes)
    options = {"donate_argnums": (1,), "devices": mesh}
    return aot.compile_for(target, step, params, cache, tokens, **options)


def prefill_chunk(
    config: DuoConfig,
    *,
    target: aot.Target,
    max_len: int,
    chunk: int,
    batch_size: int = 1,
    dtype: DTypeLike = jnp.bfloat16,
    weights: WeightFormat = "model",
    kv: KVFormat = "model",
    mode: serve.PrefillMode = "exact",
    devices: int = 1,
) -> jax.stages.Compiled:
    """Compile the prefill of one chunk, at any offset, into caches of `max_len` tokens."""

    def read(params, cache, tokens, num_tokens):
        return serve.prefill(
            config, params, cache, tokens, num_tokens, mode=mode, implementation="triton"
        )

    tokens = jax.ShapeDtypeStruct((batch_size, chunk), jnp.int32)
    num_tokens = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    mesh = described_mesh(target, devices)
    sizes = {"batch_size": batch_size, "max_len": max_len, "dtype": dtype, "kv": kv}
    params, cache = held_shapes(config, mesh=mesh, weights=weights, **sizes)
    options = {"donate_argnums": (1,), "devices": mesh}
    return aot.compile_for(target, read, params, cache, tokens, num_tokens, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedSizes:
    """Caches of an engine (duo_jax.engine.sizes)."""

    rows: int  # of the rings: requests and snapshots
    num_pages: int
    page_size: int
    max_len: int


def engine_decode(
    config: DuoConfig,
    sizes: PagedSizes,
    *,
    target: aot.Target,
    batch_size: int,
    dtype: DTypeLike = jnp.bfloat16,
    kv: KVFormat = "model",
) -> jax.stages.Compiled:
    """Compile an engine's decode step for some rows of a paged cache, which is updated in place."""

    def step(params, layers, tokens, lengths, active, table):
        return rows.decode_rows(
            config, params, layers, tokens, lengths, active, table, implementation="triton"
        )

    cache, params = _paged(config, sizes, dtype, kv)
    one = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    active = jax.ShapeDtypeStruct((batch_size,), bool)
    table = jax.ShapeDtypeStruct((batch_size, sizes.max_len // sizes.page_size), jnp.int32)
    arguments = (params, cache.layers, one, one, active, table)
    return aot.compile_for(target, step, *arguments, donate_argnums=(1,))


def engine_prefill(
    config: DuoConfig,
    sizes: PagedSizes,
    *,
    target: aot.Target,
    chunk: int,
    dtype: DTypeLike = jnp.bfloat16,
    kv: KVFormat = "model",
) -> jax.stages.Compiled:
    """Compile the reading of a chunk into one row of a paged cache."""

    def read(params, layers, row, tokens, *place):
        return rows.prefill_row(
            config, params, layers, row, tokens, *place, implementation="triton"
        )

    cache, params = _paged(config, sizes, dtype, kv)
    row, one = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1,)))
    tokens = jax.ShapeDtypeStruct((1, chunk), jnp.int32)
    table = jax.ShapeDtypeStruct((1, sizes.max_len // sizes.page_size), jnp.int32)
    arguments = (params, cache.layers, row, tokens, one, one, one, table)
    return aot.compile_for(target, read, *arguments, donate_argnums=(1,))


def _paged(config: DuoConfig, sizes: PagedSizes, dtype: DTypeLike, kv: KVFormat) -> tuple[Any, Any]:
    cache = cache_shapes(
        config,
        batch_size=sizes.rows,
        max_len=sizes.max_len,
        dtype=dtype,
        kv=kv,
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
    )
    return cache, param_shapes(config.architecture, dtype)

"""Serving programs compiled ahead of time for a described GPU, to learn how much memory they need.

Nothing is allocated or executed, and no weights are read; kernels.aot says what must be installed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from duo_jax import serve
from duo_jax.cache import KVFormat, cache_shapes
from duo_jax.heads import split
from duo_jax.heads.split import DuoConfig
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_weights import WeightFormat, quantised_shapes
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
    """Return the bytes of arrays, or of shapes, on a GPU, where jax packs two int4 to a byte."""
    return sum(
        leaf.size // 2 if leaf.dtype == jnp.int4 else leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
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
) -> jax.stages.Compiled:
    """Compile one decode step with caches of `max_len` tokens, which are updated in place."""

    def step(params, cache, tokens):
        return serve.decode(config, params, cache, tokens, implementation="triton")

    tokens = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    sizes = {"batch_size": batch_size, "max_len": max_len, "dtype": dtype, "kv": kv}
    cache = cache_shapes(config, **sizes)
    params = param_shapes(config.architecture, dtype, weights=weights)
    return aot.compile_for(target, step, params, cache, tokens, donate_argnums=(1,))


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
) -> jax.stages.Compiled:
    """Compile the prefill of one chunk, at any offset, into caches of `max_len` tokens."""

    def read(params, cache, tokens, num_tokens):
        return serve.prefill(
            config, params, cache, tokens, num_tokens, mode=mode, implementation="triton"
        )

    tokens = jax.ShapeDtypeStruct((batch_size, chunk), jnp.int32)
    num_tokens = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    sizes = {"batch_size": batch_size, "max_len": max_len, "dtype": dtype, "kv": kv}
    cache = cache_shapes(config, **sizes)
    params = param_shapes(config.architecture, dtype, weights=weights)
    return aot.compile_for(target, read, params, cache, tokens, num_tokens, donate_argnums=(1,))

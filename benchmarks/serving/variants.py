"""Our side of the serving benchmarks: one set of weights, split in several ways."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from benchmarks.serving import shapes
from duo_jax import serve
from duo_jax.cache import Cache, cache_shapes, init_cache, with_lengths
from duo_jax.checkpoints import pretrained
from duo_jax.heads import split
from duo_jax.heads.split import DuoConfig
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import Implementation

# Of keys and values; this much is drawn and repeated, since drawing all takes longer than timing.
_RANDOM_TOKENS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to split the model."""

    name: str
    retrieval: float  # fraction of retrieval heads
    config: DuoConfig


def variants(
    model: ModelConfig, retrieval: Sequence[float], *, sink_size: int, recent_size: int
) -> list[Variant]:
    """Return the model with full caches ("full"), then its splits ("duo 50%", ...)."""
    return [
        Variant(
            name="full" if fraction == 1.0 else f"duo {fraction:.0%}",
            retrieval=fraction,
            config=DuoConfig(
                architecture=model,
                retrieval_counts=shapes.retrieval_counts(model, 1.0 - fraction),
                sink_size=sink_size,
                recent_size=recent_size,
            ),
        )
        for fraction in (1.0, *retrieval)
    ]


def load_params(folder: pathlib.Path, model: ModelConfig) -> dict[str, Any]:
    """Load parameters in the serving form that all splits share (see shapes.retrieval_counts)."""
    return pretrained.load_split_params(
        folder, np.ones((model.num_layers, model.num_kv_heads), bool)
    )


def attention_params(model: ModelConfig, dtype: DTypeLike) -> dict[str, Any]:
    """Draw parameters for shapes.attention_only(model)."""
    model = shapes.attention_only(model)
    heads = np.ones((model.num_layers, model.num_kv_heads), bool)
    params = llama.init_params(model, jax.random.key(0), jnp.dtype(dtype))
    return split.split_params(model, params, heads)


def filled_cache(
    config: DuoConfig, *, context: int, max_len: int, dtype: DTypeLike, kv: str = "model"
) -> Cache:
    """Return the cache of one row after `context` random keys and values, in the format `kv`.

    What a step costs does not depend on what the cache holds, and reading a long prompt takes
    minutes on a CPU. All slots are written, so that all memory is really there.
    """
    empty = cache_shapes(config, batch_size=1, max_len=max_len, dtype=dtype, kv=kv)
    leaves, treedef = jax.tree.flatten(empty.layers)
    for i, key in enumerate(jax.random.split(jax.random.key(0), len(leaves))):
        leaves[i] = _random_like(leaves[i], key)
    layers, lengths = jax.tree.unflatten(treedef, leaves), jnp.array([context], jnp.int32)
    return Cache(layers=layers, lengths=lengths, kept=jnp.copy(lengths))


class Decoder:
    """A split model that decodes one row, a token per call.

    `params` are those it was compiled for; where they were descriptions, arrays must come first.
    """

    def __init__(
        self,
        config: DuoConfig,
        params: dict[str, Any],
        cache: Cache,
        *,
        implementation: Implementation = "auto",
        compiler_options: Mapping[str, str | bool] | None = None,
    ) -> None:
        """Compile for parameters and caches like these, which may be descriptions."""
        self.params, self._tokens = params, jnp.zeros(1, jnp.int32)
        step = functools.partial(serve.decode, config, implementation=implementation)
        self._step = _Program(step, compiler_options, params, cache, self._tokens)
        self.temp_bytes = self._step.temp_bytes

    def step(self, cache: Cache, *, tokens: int = 1) -> Cache:
        """Decode some tokens; return when all are done. The cache is updated in place."""
        for _ in range(tokens):
            logits, cache = self._step(self.params, cache, self._tokens)
        jax.block_until_ready((logits, cache))
        return cache


class Reader:
    """A split model that reads one row's prompt in chunks, from the beginning each time.

    `params` are as a Decoder's; the cache is made by the first reading.
    """

    def __init__(
        self,
        config: DuoConfig,
        params: dict[str, Any],
        tokens: Int[np.ndarray, " length"],
        *,
        chunk: int,
        mode: serve.PrefillMode,
        dtype: DTypeLike,
        implementation: Implementation = "auto",
        compiler_options: Mapping[str, str | bool] | None = None,
    ) -> None:
        """Compile for this prompt, and for parameters like these, which may be descriptions."""
        self.params, self._cache = params, None
        empty = cache_shapes(config, batch_size=1, max_len=len(tokens), dtype=dtype)
        parts = [jnp.asarray(tokens[None, i : i + chunk]) for i in range(0, len(tokens), chunk)]
        self._chunks = [(part, jnp.array([part.shape[1]], jnp.int32)) for part in parts]
        read = functools.partial(serve.prefill, config, mode=mode, implementation=implementation)
        distinct = {part.shape: (part, num_tokens) for part, num_tokens in self._chunks}
        self._read = {
            shape: _Program(read, compiler_options, params, empty, *chunk)
            for shape, chunk in distinct.items()
        }
        self.temp_bytes = max(program.temp_bytes for program in self._read.values())
        self._init_cache = functools.partial(
            init_cache, config, batch_size=1, max_len=len(tokens), dtype=dtype
        )

    def read(self) -> None:
        """Read the prompt; return when it is done."""
        cache = self._init_cache() if self._cache is None else self._cache
        cache = with_lengths(cache, jnp.zeros(1, jnp.int32))
        for part, num_tokens in self._chunks:
            program = self._read[part.shape]
            logits, cache = program(self.params, cache, part, num_tokens)
        self._cache = cache
        jax.block_until_ready((logits, cache))

    @property
    def cache(self) -> Cache:
        """The cache of the prompt that was read."""
        assert self._cache is not None, "nothing was read"
        return self._cache


class _Program:
    """A compiled function (params, cache, ...) -> (logits, cache) that donates the cache.

    `temp_bytes` is the memory it needs beside parameters, cache and results. The cache enters as
    plain buffers: lowering would build its dataclasses around descriptions of arrays, which the
    type checker of the tests refuses.
    """

    def __init__(
        self,
        function: Callable,
        compiler_options: Mapping[str, str | bool] | None,
        params: dict[str, Any],
        cache: Cache,
        *rest,
    ) -> None:
        buffers, self._treedef = jax.tree.flatten(cache)

        def on_buffers(params, buffers, *rest):
            logits, cache = function(params, jax.tree.unflatten(self._treedef, buffers), *rest)
            return logits, jax.tree.leaves(cache)

        lowered = jax.jit(on_buffers, donate_argnums=1).lower(params, buffers, *rest)
        self._compiled = lowered.compile(compiler_options=dict(compiler_options or {}))
        memory = self._compiled.memory_analysis()
        assert memory is not None
        self.temp_bytes = memory.temp_size_in_bytes

    def __call__(self, params: dict[str, Any], cache: Cache, *rest) -> tuple[jax.Array, Cache]:
        logits, buffers = self._compiled(params, jax.tree.leaves(cache), *rest)
        return logits, jax.tree.unflatten(self._treedef, buffers)


def _random_like(buffer: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    return _repeated(key, buffer.shape, jnp.dtype(buffer.dtype).name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _repeated(key, shape, dtype):
    batch, heads, slots, head_dim = shape
    drawn = min(slots, _RANDOM_TOKENS)
    draw = jax.random.bits if jnp.issubdtype(dtype, jnp.integer) else jax.random.normal
    block = draw(key, (batch, heads, drawn, head_dim), dtype)
    return jnp.tile(block, (1, 1, -(-slots // drawn), 1))[:, :, :slots]

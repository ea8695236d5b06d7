"""The two published models whose serving is measured, with their published numbers."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.serving import shapes
from benchmarks.serving.variants import Variant
from duo_jax.checkpoints import tensor_names
from duo_jax.checkpoints.orbax_checkpoint import nested
from duo_jax.heads.split import DuoConfig
from duo_jax.model.config import ModelConfig

DECODE, PREFILL = "decode", "prefill"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headline:
    """A speed-up of a model that was published, and ours to reach."""

    what: str  # DECODE or PREFILL
    model: str
    tokens: int  # in the cache, or in the prompt
    published: float
    goal: float

    def row(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the row of the serving stage that measured it, or None."""
        for row in rows:
            is_of = (row.get("what"), row.get("model")) == (self.what, self.model)
            if (
                is_of
                and self.tokens in (row.get("context"), row.get("length"))
                and "speedup" in row
            ):
                return row
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A model, its published split, and its published times on one A100-80G (bfloat16, batch 1)."""

    name: str
    architecture: ModelConfig
    retrieval_counts: tuple[int, ...]  # per layer, of the published pattern
    sink: int = 128
    recent: int = 256
    contexts: tuple[int, ...]  # to decode at; the headline first
    duo_contexts: tuple[int, ...] = ()  # where only the split model fits a GPU
    prompt: int  # tokens to prefill
    chunk: int
    decode_ms: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    decode_speedup: float  # at the headline
    prefill_seconds: tuple[float, float] | None = None
    prefill_speedup: float
    memory_saving: float
    decode_goal: float
    prefill_goal: float

    @property
    def headlines(self) -> tuple[Headline, Headline]:
        """Return those of decoding and of prefill."""
        return (
            Headline(
                what=DECODE,
                model=self.name,
                tokens=self.contexts[0],
                published=self.decode_speedup,
                goal=self.decode_goal,
            ),
            Headline(
                what=PREFILL,
                model=self.name,
                tokens=self.prompt,
                published=self.prefill_speedup,
                goal=self.prefill_goal,
            ),
        )

    @property
    def variants(self) -> tuple[Variant, Variant]:
        """Return the split model and the full one."""
        layers, heads = self.architecture.num_layers, self.architecture.num_kv_heads
        duo = DuoConfig(
            architecture=self.architecture,
            retrieval_counts=self.retrieval_counts,
            sink_size=self.sink,
            recent_size=self.recent,
        )
        fraction = duo.num_retrieval_heads / (layers * heads)
        return (
            Variant(name="duo", retrieval=fraction, config=duo),
            Variant(name="full", retrieval=1.0, config=duo.all_retrieval()),
        )


# Heads kept by the published patterns; times and speed-ups are those of arXiv 2410.10819.
LLAMA_2_7B = Published(
    name="Llama-2-7B-32K",
    architecture=shapes.model_config("mha", layers=32),
    retrieval_counts=(
        *(2, 10, 2, 5, 3, 4, 9, 8, 9, 5, 8, 10, 4, 6, 12, 9),
        *(12, 10, 9, 6, 11, 8, 14, 5, 12, 8, 12, 3, 6, 6, 12, 16),
    ),
    contexts=(134_000, 20_000, 40_000, 60_000, 80_000, 100_000, 120_000),
    duo_contexts=(200_000,),
    prompt=100_000,
    chunk=10_000,
    decode_ms={
        20_000: (20, 18),
        40_000: (26, 18),
        60_000: (32, 19),
        80_000: (39, 21),
        100_000: (45, 23),
        120_000: (51, 24),
    },
    decode_speedup=2.18,
    prefill_seconds=(19, 11),
    prefill_speedup=1.73,
    memory_saving=2.55,
    decode_goal=2.5,
    prefill_goal=1.9,
)
LLAMA_3_8B = Published(
    name="Llama-3-8B-1048k",
    architecture=shapes.model_config("gqa", layers=32),
    retrieval_counts=(
        *(1, 1, 3, 2, 2, 4, 2, 4, 6, 4, 5, 3, 2, 6, 5, 5),
        *(5, 6, 3, 5, 6, 3, 3, 6, 4, 4, 3, 4, 6, 5, 8, 2),
    ),
    contexts=(517_000, 100_000, 200_000, 300_000, 400_000, 500_000),
    duo_contexts=(1_000_000,),
    prompt=320_000,
    chunk=32_000,
    decode_ms={
        100_000: (23, 21),
        200_000: (31, 24),
        300_000: (39, 28),
        400_000: (46, 32),
        500_000: (54, 36),
    },
    decode_speedup=1.50,
    prefill_seconds=(152, 93),
    prefill_speedup=1.63,
    memory_saving=1.67,
    decode_goal=1.6,
    prefill_goal=1.7,
)


def random_params(model: ModelConfig, dtype: DTypeLike) -> dict[str, Any]:
    """Draw parameters in serving form on the device, one tensor at a time; norms are 1.

    All splits of a model share them: its retrieval heads are the first of every layer.
    """
    ends, layers = {}, [{} for _ in range(model.num_layers)]
    tensors = tensor_names.tensors(model)
    for tensor, key in zip(tensors, jax.random.split(jax.random.key(0), len(tensors)), strict=True):
        if tensor.path[-1] == "scale":
            leaf = jnp.ones(tensor.shape, dtype)
        else:
            leaf = _normal(key, tensor.shape, jnp.dtype(dtype), 1 / math.sqrt(tensor.hf_shape[1]))
        if tensor.layer is None:
            ends[tensor.path] = leaf
        else:
            layers[tensor.layer][tensor.path[1:]] = leaf
    return {**nested(ends), "layers": tuple(nested(layer) for layer in layers)}


def param_shapes(model: ModelConfig, dtype: DTypeLike) -> dict[str, Any]:
    """Describe them."""
    return jax.eval_shape(lambda: random_params(model, dtype))


def param_bytes(model: ModelConfig, dtype: DTypeLike) -> int:
    """Return the memory that they take."""
    return jnp.dtype(dtype).itemsize * sum(x.size for x in tensor_names.tensors(model))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape, dtype, scale):
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)

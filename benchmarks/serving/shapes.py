"""Two attention geometries for the benchmarks, and the split of their heads."""

import dataclasses
from typing import Literal

import numpy as np

from duo_jax.errors import InputError
from duo_jax.heads.pattern import choose_retrieval_heads
from duo_jax.model.config import ModelConfig, RopeConfig

Geometry = Literal["gqa", "mha"]

_NUM_LAYERS = 32  # of both published models


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Published:
    q_heads: int
    kv_heads: int
    embed: int
    mlp: int
    vocab: int
    theta: float


_PUBLISHED = {
    # Llama-3-8B and Llama-2-7B.
    "gqa": _Published(
        q_heads=32, kv_heads=8, embed=4096, mlp=14336, vocab=128_256, theta=500_000.0
    ),
    "mha": _Published(q_heads=32, kv_heads=32, embed=4096, mlp=11008, vocab=32_000, theta=10_000.0),
}


def model_config(
    geometry: Geometry, *, layers: int, embed: int = 4096, q_heads: int = 32
) -> ModelConfig:
    """Return a model with the attention of a published one (head_dim 128) and fewer layers.

    The vocabulary shrinks with the layers, so that the output projection keeps its share of the
    weights. A narrower `embed` shrinks the MLP with it; attention stays as it is.

    Args:
      geometry: "gqa" is Llama-3-8B (32 query heads, 8 KV heads), "mha" Llama-2-7B (32 and 32).
      layers: decoder layers; the published models have 32.
      embed: model width; the published models have 4,096.
      q_heads: query heads; fewer than 32 take KV heads along.

    Raises:
      InputError: heads do not divide.
    """
    published = _PUBLISHED[geometry]
    group = published.q_heads // published.kv_heads
    if q_heads % group:
        raise InputError(f"{q_heads} query heads are not a multiple of {group}")
    return ModelConfig(
        family="llama",
        vocab_size=published.vocab * layers // _NUM_LAYERS,
        embed_size=embed,
        mlp_size=published.mlp * embed // published.embed,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=q_heads // group,
        head_dim=128,
        norm_eps=1e-5,
        max_positions=1 << 20,
        rope=RopeConfig(theta=published.theta),
    )


def attention_only(model: ModelConfig) -> ModelConfig:
    """Return a model of the same attention, and as good as nothing else.

    A step of it takes the time of the attention part: rotation, writing the cache, attention. Its
    weights are 1% of the bytes of a full cache of 1,024 tokens.
    """
    return dataclasses.replace(model, vocab_size=2, embed_size=2, mlp_size=2)


def retrieval_counts(model: ModelConfig, sparsity: float) -> tuple[int, ...]:
    """Return the retrieval heads of every layer for a given fraction of streaming heads.

    Gates are drawn at random from a fixed seed and binarised as a learned pattern is, by one
    ranking over all layers, so layers differ as they do in published patterns. The retrieval heads
    of a layer are its first ones: then weights are in serving form as they are, and all splits
    share them. Serving never looks at which heads were chosen, only at how many.
    """
    gates = np.random.default_rng(0).random((model.num_layers, model.num_kv_heads))
    return tuple(int(n) for n in choose_retrieval_heads(gates, sparsity=sparsity).sum(axis=1))

"""Choosing the retrieval heads of a model, from a pattern and a sparsity or threshold."""

import pathlib

import numpy as np
from jaxtyping import Bool

from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, check_fits, choose_retrieval_heads, load_pattern
from duo_jax.heads.split import DuoConfig, duo_config
from duo_jax.model.config import ModelConfig
from duo_jax.schema.check import argument
from duo_jax.schema.kinds import Fraction

NO_PATTERN = "none"
DEFAULT_SPARSITY = 0.5


def split_heads(
    architecture: ModelConfig,
    pattern: str | pathlib.Path | Pattern,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    sink_size: int | None = None,
    recent_size: int | None = None,
) -> tuple[DuoConfig, Bool[np.ndarray, "layers kv_heads"]]:
    """Choose the retrieval heads of a model.

    Args:
      architecture: the model.
      pattern: a pattern or its folder; "none" makes every head a retrieval head.
      sparsity: fraction of streaming heads, in [0, 1]. Default: 0.5.
      threshold: instead of a sparsity, the gate above which a head is a retrieval head.
      sink_size: first tokens that a streaming head keeps. Default: the pattern's.
      recent_size: latest tokens that a streaming head keeps. Default: the pattern's.

    Returns:
      The split, and which heads are retrieval heads.

    Raises:
      InputError: the pattern does not fit the model, or a number is out of range.
    """
    sparsity = argument("sparsity", sparsity, Fraction | None)
    threshold = argument("threshold", threshold, Fraction | None)
    if sparsity is not None and threshold is not None:
        raise InputError("give a sparsity or a threshold, not both")
    sizes = {}
    if isinstance(pattern, str) and pattern == NO_PATTERN:
        if sparsity or threshold is not None:
            raise InputError("without a pattern there is no sparsity or threshold to choose")
        heads = np.ones((architecture.num_layers, architecture.num_kv_heads), bool)
    else:
        learned = pattern if isinstance(pattern, Pattern) else load_pattern(pattern)
        check_fits(
            learned, num_layers=architecture.num_layers, num_kv_heads=architecture.num_kv_heads
        )
        sizes = {"sink_size": learned.sink_size, "recent_size": learned.recent_size}
        if threshold is None:
            chosen = DEFAULT_SPARSITY if sparsity is None else sparsity
            heads = choose_retrieval_heads(learned.gates, sparsity=chosen)
        else:
            heads = learned.clipped() > threshold
    given = {"sink_size": sink_size, "recent_size": recent_size}
    sizes |= {name: size for name, size in given.items() if size is not None}
    return duo_config(architecture, heads, **sizes), heads

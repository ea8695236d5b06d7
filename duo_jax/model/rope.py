"""Rotary position embedding with the scaling rules of the supported families.

A head's channels are paired as (i, i + head_dim / 2), the convention of Hugging Face checkpoints;
pair i turns by position * frequency[i]. Scaling only changes the frequencies (and, for YaRN,
multiplies the result), so everything else is shared.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from duo_jax.model.config import ModelConfig, RopeConfig
from kernels.precision import accumulator

CosSin = tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]


def rotation(
    architecture: ModelConfig,
    positions: Int[Array, "batch length"],
    *,
    total_length: Int[Array, "*batch"] | int | None = None,
) -> CosSin:
    """Return the cosine and sine of every position's angles, in float32.

    Args:
      architecture: the model.
      positions: absolute positions, from 0.
      total_length: number of tokens of the whole sequence, or of each row's; only "dynamic" scaling
        depends on it. Default: the largest position + 1.
    """
    if total_length is None:
        total_length = jnp.max(positions) + 1
    frequencies, scale = frequencies_and_scale(
        architecture.rope, architecture.head_dim, total_length
    )
    frequencies = frequencies.reshape(-1, 1, frequencies.shape[-1])  # [1 or batch, 1, half]
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    cos: Float[Array, "batch length half"],
    sin: Float[Array, "batch length half"],
) -> Float[Array, "batch length heads head_dim"]:
    """Rotate every head's channel pairs; computed in float32, returned in the dtype of `x`."""
    dtype = accumulator(x.dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    cos, sin = cos[:, :, None, :].astype(dtype), sin[:, :, None, :].astype(dtype)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def frequencies_and_scale(
    rope: RopeConfig, head_dim: int, total_length: Int[Array, "*batch"] | int
) -> tuple[Float[Array, "*batch half"] | Float[Array, " half"], float]:
    """Return radians per token of each channel pair, and the factor on cosine and sine.

    Frequencies have the shape of `total_length` in front for "dynamic" scaling.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    unscaled = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return unscaled / rope.factor, 1.0
    if rope.kind == "dynamic":
        # "NTK-aware" stretching of the base once the sequence outgrows the trained range.
        original = _original(rope)
        length = jnp.maximum(jnp.asarray(total_length), original)[..., None]
        stretch = rope.factor * length.astype(jnp.float32) / original
        theta = rope.theta * (stretch - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
        return 1.0 / theta ** exponents.reshape((1,) * (theta.ndim - 1) + (-1,)), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, unscaled), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, unscaled)
    return unscaled, 1.0


def _original(rope: RopeConfig) -> int:
    """Return the range before scaling, which these rope types have."""
    assert rope.original_max_positions is not None
    return rope.original_max_positions


def _llama3(rope: RopeConfig, unscaled: Float[Array, " half"]) -> Float[Array, " half"]:
    """Slow down the pairs whose wavelength exceeds the original range, with a smooth transition."""
    turns = _original(rope) * unscaled / (2 * math.pi)  # within the original range
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return kept * unscaled + (1 - kept) * unscaled / rope.factor


def _yarn(
    rope: RopeConfig, head_dim: int, unscaled: Float[Array, " half"]
) -> tuple[Float[Array, " half"], float]:
    """Interpolate slow pairs, keep fast ones (YaRN, arXiv 2309.00071, section 3.2)."""

    def pair_with_turns(turns: float) -> float:
        ratio = _original(rope) / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = jnp.arange(head_dim // 2, dtype=jnp.float32)
    interpolated = jnp.clip((pairs - low) / (high - low), 0.0, 1.0)
    frequencies = interpolated * unscaled / rope.factor + (1 - interpolated) * unscaled

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return frequencies, mscale(1.0)

"""Rope settings of a GGUF file, as config.json's rope_parameters.

Files give linear and YaRN scaling by their numbers, but Llama 3's only by its effect: a tensor with
the factor by which each channel pair is slowed down. The numbers are found again from that tensor:
with w the wavelength of a pair, in tokens, and f its factor, pairs in the transition have

    kept = (original / w - low) / (high - low)        1 / f = kept + (1 - kept) / factor

so `kept` is a straight line in 1 / w. A result that does not give the tensor back is refused.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from duo_jax.checkpoints.gguf.header import Header
from duo_jax.errors import quoted

FACTORS = "rope_freqs.weight"
_LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
_TOLERANCE = 1e-4  # relative
_USUAL_LOW, _USUAL_HIGH = 1.0, 4.0  # of every published model
_USUAL_ORIGINALS = (8192,)


def rope_parameters(header: Header, head_dim: Any, value: Callable[..., Any]) -> dict[str, Any]:
    """Return rope_parameters.

    Args:
      header: the file's.
      head_dim: the size of a head.
      value: returns an entry of the architecture by name, or its default.

    Raises:
      InputError: the scaling is not supported.
    """
    theta = value("rope.freq_base", 10_000.0)
    factor = value("rope.scaling.factor", value("rope.scale_linear", 1.0))
    # As llama.cpp has it: a factor alone is linear, and "none" beside a factor is none.
    scaling = value("rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
    for name in _LONG_FACTORS:
        if name in header.tensors:
            raise header.refused(f"rope scaling 'longrope' ({name}) is not supported")
    if scaling not in ("none", "linear", "yarn"):
        raise header.refused(
            f"rope scaling {quoted(scaling)} is not supported; supported: none, linear, yarn, and "
            "Llama 3's factors"
        )
    if FACTORS in header.tensors:
        if scaling != "none":
            raise header.refused(f"it has rope scaling {quoted(scaling)} and factors ({FACTORS})")
        return {"rope_theta": theta, **_llama3(header, theta, head_dim, value)}
    if scaling == "yarn":
        options = {
            "original_max_position_embeddings": value("rope.scaling.original_context_length"),
            "beta_fast": value("rope.scaling.yarn_beta_fast"),
            "beta_slow": value("rope.scaling.yarn_beta_slow"),
        }
        given = {name: number for name, number in options.items() if number is not None}
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **given}
    if scaling == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(header: Header, theta: Any, head_dim: Any, value: Callable[..., Any]) -> dict[str, Any]:
    """Return the numbers of Llama 3's scaling that give the factors in the file."""
    tensor = header.tensors[FACTORS]
    fits = isinstance(head_dim, int) and tensor.shape == (head_dim // 2,)
    possible = isinstance(theta, float) and 1 < theta < math.inf
    if tensor.type.name != "F32" or not fits or not possible:
        raise header.refused(f"{FACTORS} is no list of a factor for each pair of channels")
    factors = np.array(np.memmap(header.path, "<f4", "r", tensor.start, tensor.shape), np.float64)
    if not (np.isfinite(factors).all() and (factors >= 1).all() and factors.max() < 1e6):
        raise header.refused(f"{FACTORS} holds numbers that are no rope factors")
    factor = float(factors.max())
    if factor == 1:
        return {"rope_type": "default"}
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # 1 / wavelength
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    named = value("rope.scaling.original_context_length")
    originals = (*([named] if isinstance(named, int) else []), *_USUAL_ORIGINALS)
    for low, high, original in _guesses(turns, kept, originals):
        found = np.clip((original * turns - low) / (high - low), 0, 1)
        found = 1 / (found + (1 - found) / factor)
        if np.allclose(found, factors, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise header.refused(f"{FACTORS} holds other factors than Llama 3's scaling gives")


def _guesses(
    turns: np.ndarray, kept: np.ndarray, originals: tuple[int, ...]
) -> Iterator[tuple[float, float, int]]:
    """Yield low, high and original range that may have given these shares of each pair."""
    for original in originals:
        yield _USUAL_LOW, _USUAL_HIGH, original
    between = np.flatnonzero((kept > 1e-3) & (kept < 1 - 1e-3))
    if between.size:
        at = between[0]
        original = float((kept[at] * (_USUAL_HIGH - _USUAL_LOW) + _USUAL_LOW) / turns[at])
        yield _USUAL_LOW, _USUAL_HIGH, round(original)
    if between.size > 1:
        slope, offset = map(float, np.polyfit(turns[between], kept[between], 1))
        if slope > 0 > offset:  # only the ratio of low and high has an effect
            high = round(1 - 1 / offset, 3)
            yield _USUAL_LOW, high, round(slope * (high - _USUAL_LOW))

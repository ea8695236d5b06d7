"""Rope settings of a Hugging Face config.json, in every place where they may stand.

transformers 5 writes them into rope_parameters, 4 into rope_scaling with rope_theta beside it.
Where a file says something twice, transformers 5 decides which counts:

- rope_scaling, unless it is empty, counts instead of all of rope_parameters;
- rope_theta within it counts before the one beside it;
- of original_max_position_embeddings (llama3, yarn) the one beside it counts before the one within.
"""

from typing import Any, cast, get_args

import msgspec

from duo_jax.errors import InputError, quoted
from duo_jax.model.config import (
    OWN_RANGE,
    AttentionFactor,
    Factor,
    FrequencyFactor,
    MScale,
    RopeConfig,
    RopeKind,
    Theta,
)
from duo_jax.schema.check import convert
from duo_jax.schema.kinds import LARGEST_INT32, Count

_OPTIONS = (  # numbers, under the same names in RopeConfig
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
_NEEDED = {"llama3": ("low_freq_factor", "high_freq_factor")}
_DEFAULT_THETA = 10_000.0


class RopeKeys(msgspec.Struct, kw_only=True):
    """What is read of a config.json for rope; null is as good as absent."""

    max_position_embeddings: Count
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: float | None = None
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


class _Rope(msgspec.Struct, kw_only=True):
    """What is read of rope_parameters or rope_scaling; null is as good as absent."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Theta | None = None
    factor: Factor | None = None
    original_max_position_embeddings: Count | None = None
    low_freq_factor: FrequencyFactor | None = None
    high_freq_factor: FrequencyFactor | None = None
    beta_fast: FrequencyFactor | None = None
    beta_slow: FrequencyFactor | None = None
    attention_factor: AttentionFactor | None = None
    mscale: MScale | None = None
    mscale_all_dim: MScale | None = None
    truncate: bool | None = True  # null is as good as false, alone of all
    partial_rotary_factor: float | None = None


def parse_rope(config: RopeKeys) -> RopeConfig:
    """Return a model's rotary embedding.

    Raises:
      InputError: it is not supported, or the file contradicts itself.
    """
    name = "rope_scaling" if config.rope_scaling else "rope_parameters"
    settings = config.rope_scaling or config.rope_parameters or {}
    by_layer = [k for k, v in settings.items() if isinstance(v, dict) or k.endswith("_attention")]
    if by_layer:
        raise InputError(
            f"config.json: {name} has settings of their own for {quoted(by_layer[0])}; rope "
            "settings by type of layer are not supported"
        )
    rope = convert(settings, _Rope, f"config.json, {name}")
    kind = rope.rope_type or rope.type or "default"
    if settings.get("rope_type", kind) is None and rope.type is None and rope.factor is not None:
        raise InputError(f"config.json: {name} has a factor, but its rope_type is null")
    if kind not in get_args(RopeKind):
        raise InputError(
            f"rope type {quoted(kind)} is not supported; supported: {', '.join(get_args(RopeKind))}"
        )
    partial = rope.partial_rotary_factor
    partial = config.partial_rotary_factor if partial is None else partial
    if partial not in (None, 1.0):
        raise InputError(f"partial rotary embedding (factor {partial}) is not supported")
    theta = rope.rope_theta or config.rope_theta or _default_theta(config)
    if kind == "default":
        return RopeConfig(theta=theta)
    configured = config.max_position_embeddings
    original = config.original_max_position_embeddings or rope.original_max_position_embeddings
    if original is None or kind not in ("llama3", "yarn"):
        original = configured  # transformers stretches "dynamic" from the configured range
    if rope.factor is None and kind != "yarn":
        raise InputError(f"rope type {kind!r} needs a factor")
    given = {option: getattr(rope, option) for option in _OPTIONS}
    for option in _NEEDED.get(kind, ()):
        if given[option] is None:
            raise InputError(f"rope type {kind!r} needs a {option}")
    return RopeConfig(
        kind=cast(RopeKind, kind),
        theta=theta,
        factor=rope.factor or configured / original,
        original_max_positions=original if kind in OWN_RANGE else None,
        truncate=bool(rope.truncate),
        **{option: value for option, value in given.items() if value is not None},
    )


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """Return rope_parameters; options that a rope type does not have are left out."""
    raw: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        raw["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        raw["original_max_position_embeddings"] = rope.original_max_positions
    for key in (*_OPTIONS, "truncate"):
        value = getattr(rope, key)
        if key in _NEEDED.get(rope.kind, ()) or value != getattr(RopeConfig, key):
            raw[key] = value
    return raw


def max_positions(configured: int, rope: RopeConfig) -> int:
    """Return the range including scaling that config.json leaves out of its own figure.

    Raises:
      InputError: it is beyond int32.
    """
    positions = configured
    if rope.kind in ("dynamic", "yarn"):
        positions = max(configured, int(rope.factor * (rope.original_max_positions or configured)))
    if positions > LARGEST_INT32:
        raise InputError(
            f"rope scaling stretches the range to {positions:,} positions, beyond int32"
        )
    return positions


def _default_theta(config: RopeKeys) -> float:
    """Return the base where neither the settings that count nor config.json itself give one."""
    unread = (config.rope_parameters or {}).get("rope_theta") if config.rope_scaling else None
    if unread not in (None, _DEFAULT_THETA):
        # transformers reads 10,000, which nobody can have meant.
        raise InputError(
            f"config.json: rope_scaling counts instead of rope_parameters, whose rope_theta "
            f"{quoted(unread)} would be lost; write rope_theta into rope_scaling too"
        )
    return _DEFAULT_THETA

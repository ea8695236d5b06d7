"""A model's architecture as a Hugging Face config.json, read and written.

Both forms of rope settings are read and written: that of transformers 5 (rope_parameters) and that
of transformers 4 (rope_theta and rope_scaling). The file is read directly and not through
transformers, because transformers 4 and 5 each misread the other's rope settings.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, cast, get_args

import msgspec

from duo_jax import files
from duo_jax.errors import InputError, quoted
from duo_jax.model.config import (
    FAMILIES,
    OWN_RANGE,
    AttentionFactor,
    Epsilon,
    Factor,
    FrequencyFactor,
    ModelConfig,
    MScale,
    NumHeads,
    NumLayers,
    RopeConfig,
    RopeKind,
    Theta,
    Width,
)
from duo_jax.schema.check import convert
from duo_jax.schema.json_reader import read_json
from duo_jax.schema.kinds import LARGEST_INT32, Count, Size

# Refused by name, so that nobody has to guess why a model is not served.
_UNSUPPORTED_KEYS = {
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention (MLA)",
    "quantization_config": "weights quantised by another tool",
    "attn_logit_softcapping": "attention logit soft-capping",
    "final_logit_softcapping": "logit soft-capping",
}
_ROPE_OPTIONS = (  # numbers, under the same names in RopeConfig
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
# transformers' defaults when a key is absent; null heads are as many as the query heads.
_MISTRAL_DEFAULT_WINDOW = 4096
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


class _Rope(msgspec.Struct, kw_only=True):
    """What is read of rope_parameters and rope_scaling; null is as good as absent."""

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
    truncate: bool | None = None
    partial_rotary_factor: float | None = None


class _Config(msgspec.Struct, kw_only=True):
    """What is read of a config.json; other keys are ignored."""

    model_type: str
    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: NumLayers
    num_attention_heads: NumHeads
    max_position_embeddings: Count
    rms_norm_eps: Epsilon
    num_key_value_heads: NumHeads | msgspec.UnsetType | None = msgspec.UNSET
    head_dim: NumHeads | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None  # transformers reads it in llama and qwen3 only
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    sliding_window: Size | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    partial_rotary_factor: float | None = None
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


def read_config(path: str | pathlib.Path) -> ModelConfig:
    """Read `config.json`, or the one in the folder `path`.

    Raises:
      InputError: the file is missing or not JSON, or names something that is not supported.
    """
    path = pathlib.Path(path)
    if files.is_folder(path):
        path = path / "config.json"
    if not files.exists(path):
        raise InputError(f"{files.shown(path)} does not exist; a model folder has a config.json")
    return parse_config(read_json(path))


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Translate the contents of a Hugging Face config.json.

    Raises:
      InputError: a key is missing or out of range, or the model uses something that is not
        supported.
    """
    family = raw.get("model_type")
    unsupported = [f"{feature} ({k})" for k, feature in _UNSUPPORTED_KEYS.items() if raw.get(k)]
    if unsupported:
        raise InputError(
            f"model type {quoted(family)} uses {', '.join(unsupported)}: not supported"
        )
    if not isinstance(family, str) or family not in FAMILIES:
        named = (
            f"model type {quoted(family)} is not supported" if family else "there is no model_type"
        )
        raise InputError(f"{named}; supported: {', '.join(FAMILIES)}")
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}")
    config = convert(dict(raw), _Config, "config.json")
    if config.hidden_act not in (None, "silu"):
        raise InputError(
            f"activation {quoted(config.hidden_act)} is not supported; supported: silu"
        )
    attention_bias = family in ("llama", "qwen3") and bool(config.attention_bias)
    rope = _parse_rope(config)
    max_positions = _max_positions(config.max_position_embeddings, rope)
    num_kv_heads = config.num_key_value_heads
    if num_kv_heads is msgspec.UNSET:
        num_kv_heads = _DEFAULT_KV_HEADS.get(family)
    _refuse_active_window(config, max_positions)
    return ModelConfig(
        family=family,
        vocab_size=config.vocab_size,
        embed_size=config.hidden_size,
        mlp_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads or config.num_attention_heads,
        head_dim=config.head_dim or _head_dim(config),
        norm_eps=config.rms_norm_eps,
        max_positions=max_positions,
        rope=rope,
        tie_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and bool(config.mlp_bias),
        qk_norm=family == "qwen3",
    )


def to_hf(architecture: ModelConfig) -> dict[str, Any]:
    """Return the contents of a config.json that `parse_config` reads as this architecture.

    Raises:
      ValueError: no config.json of the family describes it, such as a Llama with biases on queries,
        keys and values only.
    """
    rope = _rope_to_hf(architecture.rope)
    scaled = architecture.rope.kind != "default"
    # transformers stretches the range itself.
    stretched = architecture.rope.kind == "dynamic"
    configured = architecture.rope.original_max_positions if stretched else None
    raw = {
        "architectures": [FAMILIES[architecture.family]],
        "model_type": architecture.family,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.embed_size,
        "intermediate_size": architecture.mlp_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_q_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": architecture.norm_eps,
        "max_position_embeddings": configured or architecture.max_positions,
        "rope_parameters": rope,
        "rope_theta": architecture.rope.theta,
        "tie_word_embeddings": architecture.tie_embeddings,
    }
    if scaled:
        raw["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if architecture.family in ("llama", "qwen3"):
        raw["attention_bias"] = architecture.o_bias
    if architecture.family == "llama":
        raw["mlp_bias"] = architecture.mlp_bias
    else:
        raw |= {"sliding_window": None, "use_sliding_window": False}
    if parse_config(raw) != architecture:
        raise ValueError(
            f"no config.json of family {architecture.family!r} describes {architecture}"
        )
    return raw


def _head_dim(config: _Config) -> int:
    """Return the size of a head where config.json does not give it."""
    if config.model_type == "qwen3":
        return 128
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}, and config.json gives no head_dim"
        )
    return config.hidden_size // config.num_attention_heads


def _refuse_active_window(config: _Config, max_positions: int) -> None:
    """Refuse sliding-window attention, unless the window is as long as the model's range."""
    mistral = config.model_type == "mistral"
    window, switched_on = config.sliding_window, config.use_sliding_window
    if window is msgspec.UNSET:
        window = _MISTRAL_DEFAULT_WINDOW if mistral else None
    if switched_on is None:
        switched_on = mistral
    if "sliding_attention" in (config.layer_types or ()):
        switched_on = True
    if config.model_type != "llama" and switched_on and window and window < max_positions:
        raise InputError(
            f"sliding-window attention (window {window}) is not supported; models without it, "
            "such as Mistral v0.2 and v0.3 or Qwen with use_sliding_window false, are"
        )


def _parse_rope(config: _Config) -> RopeConfig:
    # transformers 5 keeps everything in rope_parameters, 4 in rope_theta and rope_scaling.
    merged = (config.rope_scaling or {}) | (config.rope_parameters or {})
    rope = convert(merged, _Rope, "config.json, rope settings")
    kind = rope.rope_type or rope.type or "default"
    if kind not in get_args(RopeKind):
        raise InputError(
            f"rope type {quoted(kind)} is not supported; supported: {', '.join(get_args(RopeKind))}"
        )
    for partial in (rope.partial_rotary_factor, config.partial_rotary_factor):
        if partial not in (None, 1.0):
            raise InputError(f"partial rotary embedding (factor {partial}) is not supported")
    configured = config.max_position_embeddings
    original = rope.original_max_position_embeddings or configured
    if kind == "dynamic":
        original = configured  # transformers stretches from the configured range
    given = {name: getattr(rope, name) for name in _ROPE_OPTIONS}
    return RopeConfig(
        kind=cast(RopeKind, kind),
        theta=rope.rope_theta or config.rope_theta or 10_000.0,
        factor=rope.factor or configured / original,
        original_max_positions=original if kind in OWN_RANGE else None,
        truncate=True if rope.truncate is None else rope.truncate,
        **{name: value for name, value in given.items() if value is not None},
    )


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """Return rope_parameters; options that a rope type does not have are left out."""
    raw: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        raw["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        raw["original_max_position_embeddings"] = rope.original_max_positions
    needed = {"llama3": ("low_freq_factor", "high_freq_factor")}.get(rope.kind, ())
    for key in (*_ROPE_OPTIONS, "truncate"):
        value = getattr(rope, key)
        if key in needed or value != getattr(RopeConfig, key):
            raw[key] = value
    return raw


def _max_positions(configured: int, rope: RopeConfig) -> int:
    """Return the range including scaling that config.json leaves out of its own figure."""
    positions = configured
    if rope.kind in ("dynamic", "yarn"):
        positions = max(configured, int(rope.factor * (rope.original_max_positions or configured)))
    if positions > LARGEST_INT32:
        raise InputError(
            f"rope scaling stretches the range to {positions:,} positions, beyond int32"
        )
    return positions

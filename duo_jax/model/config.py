"""The architecture of a model, read from a Hugging Face config.json (transformers 4 or 5 form)."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from duo_jax import files
from duo_jax.errors import InputError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

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
_ROPE_OPTIONS = (
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
_MISTRAL_DEFAULT_WINDOW = 4096  # transformers' default when the key is absent


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: its base and how it is scaled (transformers' rope types)."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_max_positions: int | None = None  # dynamic, llama3, yarn: range before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived from factor and the mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions

    def __post_init__(self) -> None:
        if self.kind in ("dynamic", "llama3", "yarn") and self.original_max_positions is None:
            raise InputError(f"rope type {self.kind!r} needs original_max_position_embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-family decoder. Holds architecture only: no dtype, no run modes."""

    family: str
    vocab_size: int
    embed_size: int
    mlp_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int  # positions the model was made for, rope scaling included
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(
                f"model type {self.family!r} is not supported; supported: {', '.join(FAMILIES)}"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_q_heads} query heads cannot be shared by {self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def q_per_kv(self) -> int:
        """Query heads that read one KV head."""
        return self.num_q_heads // self.num_kv_heads


def read_config(path: str | pathlib.Path) -> ModelConfig:
    """Read `config.json`, or the one in the folder `path`.

    Raises:
      InputError: the file is missing or not JSON, or names something that is not supported.
    """
    path = pathlib.Path(path)
    if files.is_folder(path):
        path = path / "config.json"
    if not files.exists(path):
        raise InputError(f"{path} does not exist; a model folder has a config.json")
    return parse_config(files.read_json(path))


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Translate the contents of a Hugging Face config.json.

    The file is read directly and not through transformers, because transformers 4 and 5 each
    misread the other's rope settings.

    Raises:
      InputError: a key is missing, or the model uses something that is not supported.
    """
    family = raw.get("model_type")
    unsupported = [f"{feature} ({k})" for k, feature in _UNSUPPORTED_KEYS.items() if raw.get(k)]
    if unsupported:
        raise InputError(f"model type {family!r} uses {', '.join(unsupported)}: not supported")
    if family not in FAMILIES:
        named = f"model type {family!r} is not supported" if family else "there is no model_type"
        raise InputError(f"{named}; supported: {', '.join(FAMILIES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"activation {raw['hidden_act']!r} is not supported; supported: silu")

    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    required += ("num_attention_heads", "max_position_embeddings", "rms_norm_eps")
    missing = [key for key in required if raw.get(key) is None]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}")
    for key in (*required, "num_key_value_heads", "head_dim"):
        _check_positive(key, raw.get(key))

    num_q_heads = raw["num_attention_heads"]
    # transformers reads attention_bias in these two only.
    attention_bias = family in ("llama", "qwen3") and bool(raw.get("attention_bias", False))
    rope = _parse_rope(raw)
    max_positions = _max_positions(raw["max_position_embeddings"], rope)
    _refuse_active_window(raw, family, max_positions)
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        embed_size=raw["hidden_size"],
        mlp_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_q_heads=num_q_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_q_heads,
        head_dim=_head_dim(raw, family),
        norm_eps=float(raw["rms_norm_eps"]),
        max_positions=max_positions,
        rope=rope,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
    )


def _check_positive(key: str, value: Any) -> None:
    kinds = (int, float) if key == "rms_norm_eps" else int
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and value > 0):
        return
    kind = "number" if key == "rms_norm_eps" else "whole number"
    raise InputError(f"{key} is {value!r} in config.json, not a positive {kind}")


def _head_dim(raw: Mapping[str, Any], family: str) -> int:
    if raw.get("head_dim"):
        return raw["head_dim"]
    if family == "qwen3":
        return 128
    if raw["hidden_size"] % raw["num_attention_heads"]:
        raise InputError(
            f"hidden_size {raw['hidden_size']} is not a multiple of num_attention_heads "
            f"{raw['num_attention_heads']}, and config.json gives no head_dim"
        )
    return raw["hidden_size"] // raw["num_attention_heads"]


def _refuse_active_window(raw: Mapping[str, Any], family: str, max_positions: int) -> None:
    """Refuse sliding-window attention, unless the window is as long as the model's range."""
    window = raw.get("sliding_window", _MISTRAL_DEFAULT_WINDOW if family == "mistral" else None)
    switched_on = raw.get("use_sliding_window", family == "mistral")
    if "sliding_attention" in (raw.get("layer_types") or ()):
        switched_on = True
    if family != "llama" and switched_on and window and window < max_positions:
        raise InputError(
            f"sliding-window attention (window {window}) is not supported; models without it, "
            "such as Mistral v0.2 and v0.3 or Qwen with use_sliding_window false, are"
        )


def _parse_rope(raw: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 keeps everything in rope_parameters, 4 in rope_theta and rope_scaling.
    settings = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in get_args(RopeKind):
        raise InputError(
            f"rope type {kind!r} is not supported; supported: {', '.join(get_args(RopeKind))}"
        )
    partial = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise InputError(f"partial rotary embedding (factor {partial}) is not supported")
    theta = settings.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    configured = raw["max_position_embeddings"]
    original = settings.get("original_max_position_embeddings") or configured
    if kind == "dynamic":
        original = configured  # transformers stretches from the configured range
    given = {key: settings[key] for key in _ROPE_OPTIONS if settings.get(key) is not None}
    optional = {k: bool(v) if k == "truncate" else float(v) for k, v in given.items()}
    return RopeConfig(
        kind=kind,
        theta=float(theta),
        factor=float(settings.get("factor") or configured / original),
        original_max_positions=original if kind in ("dynamic", "llama3", "yarn") else None,
        **optional,
    )


def _max_positions(configured: int, rope: RopeConfig) -> int:
    """Return the range including scaling that config.json leaves out of its own figure."""
    if rope.kind in ("dynamic", "yarn"):
        return max(configured, int(rope.factor * (rope.original_max_positions or configured)))
    return configured

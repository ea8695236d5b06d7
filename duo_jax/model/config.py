"""The architecture of a model, read from and written as a Hugging Face config.json.

Both forms of rope settings are read and written: that of transformers 5 (rope_parameters) and that
of transformers 4 (rope_theta and rope_scaling).
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from duo_jax import files
from duo_jax.errors import InputError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

FAMILIES = {  # model_type: class in transformers
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

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
_OWN_RANGE = ("dynamic", "llama3", "yarn")  # rope types that depend on the range before scaling
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
        if self.kind in _OWN_RANGE and self.original_max_positions is None:
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

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that `parse_config` reads as this architecture.

        Raises:
          ValueError: no config.json of the family describes it, such as a Llama with biases on
            queries, keys and values only.
        """
        rope = _rope_to_hf(self.rope)
        # transformers stretches the range itself.
        configured = self.rope.original_max_positions if self.rope.kind == "dynamic" else None
        raw = {
            "architectures": [FAMILIES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.embed_size,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_q_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": configured or self.max_positions,
            "rope_parameters": rope,
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tie_embeddings,
        }
        if self.rope.kind != "default":
            raw["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if self.family in ("llama", "qwen3"):
            raw["attention_bias"] = self.o_bias
        if self.family == "llama":
            raw["mlp_bias"] = self.mlp_bias
        else:
            raw |= {"sliding_window": None, "use_sliding_window": False}
        if parse_config(raw) != self:
            raise ValueError(f"no config.json of family {self.family!r} describes {self}")
        return raw


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
    truncate = settings.get("truncate")
    return RopeConfig(
        kind=kind,
        theta=float(theta),
        factor=float(settings.get("factor") or configured / original),
        original_max_positions=original if kind in _OWN_RANGE else None,
        truncate=True if truncate is None else bool(truncate),
        **{key: float(value) for key, value in given.items()},
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
    if rope.kind in ("dynamic", "yarn"):
        return max(configured, int(rope.factor * (rope.original_max_positions or configured)))
    return configured

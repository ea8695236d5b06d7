"""A model's architecture as a Hugging Face config.json, read and written.

Both forms of rope settings are read and written (duo_jax.model.hf_rope): that of transformers 5
(rope_parameters) and that of transformers 4 (rope_theta and rope_scaling). The file is read
directly and not through transformers, whose versions 4 and 5 each misread the other's settings.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from duo_jax import files
from duo_jax.errors import InputError, quoted
from duo_jax.model.config import (
    FAMILIES,
    Epsilon,
    ModelConfig,
    NumHeads,
    NumLayers,
    Width,
)
from duo_jax.model.hf_rope import RopeKeys, max_positions, parse_rope, rope_to_hf
from duo_jax.schema.check import convert
from duo_jax.schema.json_reader import read_json

# Refused by name, so that nobody has to guess why a model is not served.
_UNSUPPORTED_KEYS = {
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention (MLA)",
    "quantization_config": "weights quantised by another tool",
    "attn_logit_softcapping": "attention logit soft-capping",
    "final_logit_softcapping": "logit soft-capping",
    "per_layer_config": "layers of different shapes",
    "transformers_weights": "a file of weights under a name of its own",
}
_DEFAULTS = {  # transformers', of what may be absent
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
}
# What transformers does not read in a family, whatever it holds.
_UNREAD = {
    "llama": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    "mistral": ("use_sliding_window", "max_window_layers"),
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


class _Config(RopeKeys, kw_only=True):
    """What is read of a config.json; other keys are ignored, and null is as good as absent."""

    model_type: str
    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: NumLayers
    num_attention_heads: NumHeads
    num_key_value_heads: NumHeads | None = None  # null: as many as the query heads
    rms_norm_eps: Epsilon = 1e-6
    head_dim: NumHeads | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None  # transformers reads it in llama and qwen3 only
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    sliding_window: int | None = 4096  # null: none
    use_sliding_window: bool | None = None
    max_window_layers: int | None = None
    layer_types: list[str] | None = None


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
    if not raw.get("is_causal", True):
        raise InputError("attention to later tokens (is_causal false) is not supported")
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}")
    read = {key: value for key, value in raw.items() if key not in _UNREAD.get(family, ())}
    for key in ("rms_norm_eps", "max_position_embeddings"):
        if read.get(key) is None:
            read.pop(key, None)
    for key in ("rope_scaling", "rope_parameters"):
        read[key] = read.get(key) or None  # transformers takes [] and "" as absent too
    config = convert(_DEFAULTS[family] | read, _Config, "config.json")
    if config.hidden_act not in (None, "silu", "swish"):  # two names of one function
        raise InputError(
            f"activation {quoted(config.hidden_act)} is not supported; supported: silu"
        )
    attention_bias = family in ("llama", "qwen3") and bool(config.attention_bias)
    rope = parse_rope(config)
    positions = max_positions(config.max_position_embeddings, rope)
    _refuse_active_window(config, positions)
    return ModelConfig(
        family=family,
        vocab_size=config.vocab_size,
        embed_size=config.hidden_size,
        mlp_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or _head_dim(config),
        norm_eps=config.rms_norm_eps,
        max_positions=positions,
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
    rope = rope_to_hf(architecture.rope)
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
    """Refuse sliding-window attention where transformers applies it and a text can outgrow it.

    Llama has none. In Mistral and Qwen layer_types says which layers have one; without it, Mistral
    has one in all, and Qwen from layer max_window_layers on. Qwen needs use_sliding_window too.
    """
    if config.model_type == "llama":
        return
    window, first = config.sliding_window, 0
    if config.model_type != "mistral":
        window = window if config.use_sliding_window else None
        first = 28 if config.max_window_layers is None else config.max_window_layers
    if config.layer_types is None:
        slides = window is not None and first < config.num_hidden_layers
    else:
        slides = _slides(config.layer_types, config.num_hidden_layers)
    if slides and (window is None or window < max_positions):
        raise InputError(
            f"sliding-window attention (window {config.sliding_window}) is not supported; models "
            "without it, such as Mistral v0.2 and v0.3 (sliding_window null) or Qwen with "
            "use_sliding_window false, are"
        )


def _slides(layer_types: list[str], num_layers: int) -> bool:
    """Whether a layer has sliding-window attention; layers of any other kind are refused."""
    if len(layer_types) != num_layers:
        raise InputError(
            f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers"
        )
    for kind in layer_types:
        if kind not in ("full_attention", "attention", "sliding_attention"):
            raise InputError(f"layers of type {quoted(kind)} are not supported")
    return "sliding_attention" in layer_types

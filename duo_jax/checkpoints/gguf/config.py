"""The architecture that a GGUF file names, as the contents of a Hugging Face config.json.

So it passes the same checks as a config.json, and a conversion has one to write.
"""

import pathlib
from typing import Any

import numpy as np

from duo_jax.checkpoints.gguf.header import Header, read_header
from duo_jax.checkpoints.gguf.rope import rope_parameters
from duo_jax.errors import InputError, quoted
from duo_jax.files import shown
from duo_jax.model.config import FAMILIES, ModelConfig
from duo_jax.model.hf_config import parse_config

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say llama
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
# Numbers that are not read and would change the result, and the values that change nothing.
_WITHOUT_EFFECT = {
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0, -1.0),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
_SPECIAL_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}


def read_config(path: pathlib.Path) -> ModelConfig:
    """Read the architecture of a GGUF file.

    Raises:
      InputError: the file cannot be read, or the model is not supported.
    """
    return architecture_of(read_header(path))


def architecture_of(header: Header) -> ModelConfig:
    """Return the architecture that a header describes.

    Raises:
      InputError: it is not supported, or not complete.
    """
    raw = hf_config(header)
    try:
        return parse_config(raw)
    except InputError as error:
        raise InputError(f"{shown(header.path)}, read as a config.json: {error}") from None


def hf_config(header: Header) -> dict[str, Any]:
    """Return what the model's config.json would hold.

    Raises:
      InputError: the architecture is not supported, or the file lacks one of its numbers.
    """
    metadata, tensors = header.metadata, header.tensors
    kind = header.value("general.architecture")
    if kind not in ARCHITECTURES:
        raise header.refused(
            f"architecture {quoted(kind)} is not supported; supported: {', '.join(ARCHITECTURES)} "
            "(Mistral's files say llama)"
        )

    def value(name: str, default: Any = None) -> Any:
        found = metadata.get(f"{kind}.{name}", default)
        if isinstance(found, np.ndarray):  # one number for each layer
            if not len(found) or (found != found[0]).any():
                raise header.refused(f"{kind}.{name} differs from layer to layer")
            found = found[0].item()
        # 0.00001 is stored as the nearest float32, which is 9.99999974e-06.
        with np.errstate(over="ignore"):  # beyond float32 it is infinite, which is refused
            return float(str(np.float32(found))) if isinstance(found, float) else found

    sizes = {key: value(name) for key, name in _SIZES.items()}
    missing = [f"{kind}.{_SIZES[key]}" for key, size in sizes.items() if size is None]
    eps = value("attention.layer_norm_rms_epsilon")
    missing += [f"{kind}.attention.layer_norm_rms_epsilon"] if eps is None else []
    missing += [] if "token_embd.weight" in tensors else ["token_embd.weight"]
    if missing:
        raise header.refused(f"it lacks {', '.join(missing)}")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    head_dim = value("attention.key_length", value("rope.dimension_count"))
    if head_dim is None and isinstance(width, int) and isinstance(heads, int) and heads:
        head_dim = width // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if value(name, head_dim) != head_dim:
            raise header.refused(
                f"{kind}.{name} is {quoted(value(name))}, which is supported only where it is the "
                f"size of a head ({quoted(head_dim)})"
            )
    for name, harmless in _WITHOUT_EFFECT.items():
        if value(name, harmless[0]) not in harmless:
            raise header.refused(f"{kind}.{name} {quoted(value(name))} is not supported")
    raw = sizes | {
        "architectures": [FAMILIES[kind]],
        "model_type": kind,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_local_experts": value("expert_count", 0),
        "rope_parameters": rope_parameters(header, head_dim, value),
    }
    if kind == "llama":
        raw["attention_bias"] = "blk.0.attn_q.bias" in tensors
        raw["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    else:
        raw["use_sliding_window"] = False
    window = value("attention.sliding_window")
    if window is not None:
        raw |= {"sliding_window": window, "use_sliding_window": True}
        if kind == "llama":
            raw |= {"model_type": "mistral", "architectures": [FAMILIES["mistral"]]}
    raw |= {
        key: header.value(f"tokenizer.ggml.{name}")
        for key, name in _SPECIAL_TOKENS.items()
        if f"tokenizer.ggml.{name}" in metadata
    }
    return {key: item for key, item in raw.items() if key != "num_local_experts" or item}

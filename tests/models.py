"""Tiny random checkpoints of every supported family, written without torch.

One list feeds the live comparison with transformers, the golden files, and every other test that
needs a model. Weights are a pure function of (seed, tensor name), so only results are committed.
"""

import json
import pathlib
import zlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

_BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _config(model_type: str, architecture: str, **changes) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10000.0} | changes.pop("rope", {})
    return (
        _BASE
        | {"model_type": model_type, "architectures": [architecture], "rope_parameters": rope}
        | changes
    )


def llama(**changes) -> dict:
    return _config("llama", "LlamaForCausalLM", **changes)


def qwen3(**changes) -> dict:
    return _config("qwen3", "Qwen3ForCausalLM", **({"head_dim": 24, "hidden_size": 40} | changes))


CASES = {
    "llama-2, one KV head per query head": llama(num_key_value_heads=4),
    "llama-3, grouped queries": llama(rope={"rope_theta": 500000.0}),
    # A head_dim of 64 has channel pairs on every part of the scaling ramps.
    "llama-3.1, scaled rope": llama(
        head_dim=64,
        rope={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama-3.2, tied embeddings": llama(tie_word_embeddings=True, head_dim=16),
    "llama, multi-query, biases": llama(
        num_key_value_heads=1, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-6
    ),
    "llama, linear rope": llama(rope={"rope_type": "linear", "factor": 4.0}),
    "llama, dynamic rope": llama(
        rope={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=24
    ),
    "llama, yarn with mscale": llama(
        head_dim=64,
        rope={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
        },
    ),
    "mistral, no window": _config("mistral", "MistralForCausalLM", sliding_window=None, head_dim=8),
    "qwen2.5, biases, yarn": _config(
        "qwen2",
        "Qwen2ForCausalLM",
        tie_word_embeddings=True,
        use_sliding_window=False,
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "qwen3, norms on q and k": qwen3(rope={"rope_theta": 1000000.0}),
}
# These differ from others in how rope turns alone.
ROPE_ONLY = ["llama-3, grouped queries", "llama-3.1, scaled rope", "llama, linear rope"]
ROPE_ONLY += ["mistral, no window"]
# For tests of what does not ask how it turns: by default without them.
BY_ROPE = [pytest.param(x, marks=[pytest.mark.slow] * (x in ROPE_ONLY)) for x in CASES]
# What serving tells apart: norms, biases, tied embeddings, a rope that depends on the length read.
# By default for tests that serve: test_parity.py compares the logits of every family.
SERVED = ["qwen3, norms on q and k", "qwen2.5, biases, yarn", "llama, dynamic rope"]
BY_SERVING = [pytest.param(x, marks=[pytest.mark.slow] * (x not in SERVED)) for x in CASES]
LENGTH = 45  # beyond the original range of the scaled cases


def tokens(raw: dict, *, batch: int = 2, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, raw["vocab_size"], (batch, length), np.int32)


def hf_tensors(raw: dict, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a checkpoint's tensors under their Hugging Face names, in float32."""
    embed, mlp, vocab = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    head_dim = raw.get("head_dim") or embed // raw["num_attention_heads"]
    q_size = raw["num_attention_heads"] * head_dim
    kv_size = raw["num_key_value_heads"] * head_dim
    bias = raw.get("attention_bias", False)
    shapes = {"model.embed_tokens.weight": (vocab, embed), "model.norm.weight": (embed,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, embed)
    for layer in range(raw["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (embed,),
            "post_attention_layernorm.weight": (embed,),
            "self_attn.q_proj.weight": (q_size, embed),
            "self_attn.k_proj.weight": (kv_size, embed),
            "self_attn.v_proj.weight": (kv_size, embed),
            "self_attn.o_proj.weight": (embed, q_size),
            "mlp.gate_proj.weight": (mlp, embed),
            "mlp.up_proj.weight": (mlp, embed),
            "mlp.down_proj.weight": (embed, mlp),
        }
        if bias or raw["model_type"] == "qwen2":
            block |= {"self_attn.q_proj.bias": (q_size,), "self_attn.k_proj.bias": (kv_size,)}
            block |= {"self_attn.v_proj.bias": (kv_size,)}
        if bias:
            block |= {"self_attn.o_proj.bias": (embed,)}
        if raw.get("mlp_bias"):
            block |= {"mlp.gate_proj.bias": (mlp,), "mlp.up_proj.bias": (mlp,)}
            block |= {"mlp.down_proj.bias": (embed,)}
        if raw["model_type"] == "qwen3":
            block |= {"self_attn.q_norm.weight": (head_dim,)}
            block |= {"self_attn.k_norm.weight": (head_dim,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape, np.float32)
        if "norm" in name:
            return 1 + 0.2 * values
        return values * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    return {name: draw(name, shape) for name, shape in shapes.items()}


# For tests of what only moves tensors: by default the first case of each set of them.
_FIRST = {frozenset(hf_tensors(raw)): name for name, raw in reversed(CASES.items())}.values()
BY_TENSORS = [pytest.param(x, marks=[pytest.mark.slow] * (x not in _FIRST)) for x in CASES]


def write_hf(
    folder: pathlib.Path, raw: dict, *, dtype: str = "float32", seed: int = 0
) -> pathlib.Path:
    """Write config.json and model.safetensors as transformers would."""
    folder.mkdir(parents=True, exist_ok=True)
    cast = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    tensors = {k: v.astype(cast) for k, v in hf_tensors(raw, seed=seed).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": dtype}))
    return folder


def write_tokenizer(folder: pathlib.Path, *, vocab_size: int = 600) -> pathlib.Path:
    """Train a small byte-level BPE and save it as transformers would."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models

    text = (
        "Here is a long text with passkeys hidden in it. Remember them. Take note: this is the "
        "first second third passkey to the vault. What is the passkey to the vault? alpha bravo "
        "charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa "
        "quebec romeo sierra tango uniform victor whiskey xray yankee zulu\n"
    )
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text * 20], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder

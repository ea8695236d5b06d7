"""Configs of real models: what the hub holds of them, and what must come of it."""

import dataclasses

import pytest

from duo_jax.model.config import ModelConfig, RopeConfig
from duo_jax.model.hf_config import parse_config


def published(model_type: str, sizes: str, **others) -> dict:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    values = dict(zip(names, map(int, sizes.split()), strict=True))
    return {"model_type": model_type, "hidden_act": "silu"} | values | others


LLAMA_31_SCALING = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# As far as it matters.
REAL = {
    "Llama-2-7B": (
        published(
            "llama",
            "32000 4096 11008 32 32 32 4096",
            rms_norm_eps=1e-5,
            rope_scaling=None,
            tie_word_embeddings=False,
        ),
        {"num_kv_heads": 32, "head_dim": 128, "rope": RopeConfig(theta=1e4)},
    ),
    "Llama-3-8B": (
        published(
            "llama",
            "128256 4096 14336 32 32 8 8192",
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=None,
            attention_bias=False,
            tie_word_embeddings=False,
        ),
        {"num_kv_heads": 8, "head_dim": 128, "rope": RopeConfig(theta=5e5)},
    ),
    "Llama-3.1-8B": (
        published(
            "llama",
            "128256 4096 14336 32 32 8 131072",
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=LLAMA_31_SCALING | {"factor": 8.0},
            mlp_bias=False,
            tie_word_embeddings=False,
        ),
        {
            "num_kv_heads": 8,
            "head_dim": 128,
            "max_positions": 131072,
            "rope": RopeConfig(kind="llama3", theta=5e5, factor=8.0, original_max_positions=8192),
        },
    ),
    "Llama-3.2-1B": (
        published(
            "llama",
            "128256 2048 8192 16 32 8 131072",
            rms_norm_eps=1e-5,
            head_dim=64,
            rope_theta=500000.0,
            rope_scaling=LLAMA_31_SCALING | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
        {
            "num_kv_heads": 8,
            "head_dim": 64,
            "tie_embeddings": True,
            "max_positions": 131072,
            "rope": RopeConfig(kind="llama3", theta=5e5, factor=32.0, original_max_positions=8192),
        },
    ),
    "Mistral-7B-v0.2": (
        published(
            "mistral",
            "32000 4096 14336 32 32 8 32768",
            rms_norm_eps=1e-5,
            rope_theta=1000000.0,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        {"num_kv_heads": 8, "head_dim": 128, "rope": RopeConfig(theta=1e6)},
    ),
    "Mistral-7B-v0.3": (
        published(
            "mistral",
            "32768 4096 14336 32 32 8 32768",
            rms_norm_eps=1e-5,
            rope_theta=1000000.0,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        {"num_kv_heads": 8, "head_dim": 128, "vocab_size": 32768, "rope": RopeConfig(theta=1e6)},
    ),
    "Qwen2.5-7B": (
        published(
            "qwen2",
            "152064 3584 18944 28 28 4 131072",
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            sliding_window=131072,
            use_sliding_window=False,
            max_window_layers=28,
            tie_word_embeddings=False,
        ),
        {
            "num_kv_heads": 4,
            "head_dim": 128,
            "norm_eps": 1e-6,
            "qkv_bias": True,
            "rope": RopeConfig(theta=1e6),
        },
    ),
    "Qwen2.5-7B-Instruct with the YaRN its card recommends": (
        published(
            "qwen2",
            "152064 3584 18944 28 28 4 32768",
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            rope_scaling={
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
            use_sliding_window=False,
        ),
        {
            "num_kv_heads": 4,
            "head_dim": 128,
            "norm_eps": 1e-6,
            "qkv_bias": True,
            "max_positions": 131072,
            "rope": RopeConfig(kind="yarn", theta=1e6, factor=4.0, original_max_positions=32768),
        },
    ),
    "Qwen3-8B": (
        published(
            "qwen3",
            "151936 4096 12288 36 32 8 40960",
            rms_norm_eps=1e-6,
            head_dim=128,
            rope_theta=1000000,
            rope_scaling=None,
            attention_bias=False,
            sliding_window=None,
            use_sliding_window=False,
            tie_word_embeddings=False,
        ),
        {
            "num_kv_heads": 8,
            "head_dim": 128,
            "norm_eps": 1e-6,
            "qk_norm": True,
            "rope": RopeConfig(theta=1e6),
        },
    ),
    "Qwen3-4B, wider heads than hidden / heads": (
        published(
            "qwen3",
            "151936 2560 9728 36 32 8 40960",
            rms_norm_eps=1e-6,
            head_dim=128,
            rope_theta=1000000,
            tie_word_embeddings=True,
        ),
        {
            "num_kv_heads": 8,
            "head_dim": 128,
            "norm_eps": 1e-6,
            "qk_norm": True,
            "tie_embeddings": True,
            "rope": RopeConfig(theta=1e6),
        },
    ),
}


@pytest.mark.parametrize(("raw", "expected"), REAL.values(), ids=REAL.keys())
def test_real_models(raw, expected):
    copied = ModelConfig(
        family=raw["model_type"],
        vocab_size=raw["vocab_size"],
        embed_size=raw["hidden_size"],
        mlp_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_q_heads=raw["num_attention_heads"],
        num_kv_heads=1,  # replaced, as head_dim is
        head_dim=2,
        norm_eps=1e-5,
        max_positions=raw["max_position_embeddings"],
    )
    assert parse_config(raw) == dataclasses.replace(copied, **expected)

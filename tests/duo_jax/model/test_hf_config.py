"""What a config.json means where it says things twice, or leaves them open: as transformers does.

With torch, transformers itself is asked about every case.
"""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.errors import InputError
from duo_jax.model import rope
from duo_jax.model.config import RopeConfig
from duo_jax.model.hf_config import parse_config
from tests import models

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")

# --- rope ---

BASE = models.llama(head_dim=64, max_position_embeddings=32)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}


def yarn(**changes) -> RopeConfig:
    settings = {"kind": "yarn", "theta": 1e4, "factor": 4.0, "original_max_positions": 32}
    return RopeConfig(**settings | changes)


def in_parameters(settings: dict, **beside) -> dict:
    return {"rope_parameters": settings} | beside


ROPE = {
    "rope_scaling counts before rope_parameters": (
        {"rope_scaling": YARN, "rope_theta": 1e6, "rope_parameters": PLAIN},
        yarn(theta=1e6),
    ),
    "with a base of its own": (
        {"rope_scaling": YARN | {"rope_theta": 5e5}, "rope_theta": 7.0, "rope_parameters": PLAIN},
        yarn(theta=5e5),
    ),
    "default before yarn": (
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e6, "rope_parameters": YARN},
        RopeConfig(theta=1e6),
    ),
    "linear before yarn": (
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": YARN},
        RopeConfig(kind="linear", factor=2.0),
    ),
    "an empty rope_scaling does not count": (in_parameters(YARN, rope_scaling={}), yarn()),
    "a list that is empty does not count": (in_parameters(YARN, rope_scaling=[]), yarn()),
    "nor does an empty text": ({"rope_scaling": "", "rope_parameters": None}, RopeConfig()),
    "a base within counts before one beside": (
        in_parameters(YARN | {"rope_theta": 5e5}, rope_theta=1e6),
        yarn(theta=5e5),
    ),
    "a base beside": (in_parameters(YARN, rope_theta=1e6), yarn(theta=1e6)),
    "no settings": ({"rope_parameters": None}, RopeConfig()),
    "yarn, original range beside": (
        in_parameters({"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=16),
        yarn(original_max_positions=16),
    ),
    "yarn, original range beside before within": (
        in_parameters(YARN, original_max_position_embeddings=16),
        yarn(original_max_positions=16),
    ),
    "llama3, original range beside before within": (
        in_parameters(
            LLAMA3 | {"original_max_position_embeddings": 8}, original_max_position_embeddings=16
        ),
        RopeConfig(kind="llama3", factor=8.0, original_max_positions=16),
    ),
    "dynamic has no original range": (
        in_parameters(
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
            original_max_position_embeddings=16,
        ),
        RopeConfig(kind="dynamic", factor=2.0, original_max_positions=32),
    ),
    "yarn, no original range": (
        in_parameters({"rope_type": "yarn", "factor": 4.0}),
        yarn(),
    ),
    "yarn, a factor to derive": (
        in_parameters(YARN | {"factor": None}, max_position_embeddings=128),
        yarn(),
    ),
    "yarn, null for truncate is false": (
        in_parameters(YARN | {"truncate": None}),
        yarn(truncate=False),
    ),
    "yarn, one mscale of two": (in_parameters(YARN | {"mscale": 0.7}), yarn(mscale=0.7)),
    "yarn, nulls": (in_parameters(YARN | {"beta_fast": None, "attention_factor": None}), yarn()),
    "rope_type before type": (
        in_parameters({"rope_type": "linear", "type": "dynamic", "factor": 2.0}),
        RopeConfig(kind="linear", factor=2.0),
    ),
    "no type, so that nothing is scaled": (in_parameters({"factor": 2.0}), RopeConfig()),
    "a whole rotary embedding": (
        in_parameters({"rope_type": "default", "partial_rotary_factor": None})
        | {"partial_rotary_factor": None},
        RopeConfig(),
    ),
    "a whole one within, a part of it beside": (
        in_parameters({"rope_type": "default", "partial_rotary_factor": 1.0})
        | {"partial_rotary_factor": 0.5},
        RopeConfig(),
    ),
}


@pytest.mark.parametrize(("changes", "expected"), ROPE.values(), ids=ROPE.keys())
def test_rope_settings_in_every_place(changes, expected):
    config = parse_config(BASE | changes)
    assert config.rope == expected
    scaled = expected.kind in ("yarn", "dynamic")
    original = expected.original_max_positions or 0
    configured = changes.get("max_position_embeddings", 32)
    assert config.max_positions == max(configured, int(scaled * expected.factor * original))


@needs_torch
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("changes", "expected"), ROPE.values(), ids=ROPE.keys())
def test_transformers_reads_the_same_rope_settings(tmp_path, family, changes, expected):
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = BASE | changes | {"model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    position = torch.tensor([[99]])
    cos, sin = theirs(torch.zeros(1), position)
    ours = rope.rotation(parse_config(raw), jnp.array([[99]]))
    for got, want in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(got, want[..., :32], atol=2e-5)
    assert parse_config(raw).rope == expected


ROPE_REFUSED = {
    "a base that would be lost": (
        {"rope_scaling": YARN, "rope_parameters": PLAIN},
        "rope_scaling counts instead of rope_parameters, whose rope_theta 1000000.0 would be lost",
    ),
    "settings by type of layer": (
        in_parameters({"full_attention": PLAIN, "sliding_attention": PLAIN}),
        "rope_parameters has settings of their own for 'full_attention'",
    ),
    "settings by type of layer, null": (
        in_parameters({"sliding_attention": None}),
        "rope_parameters has settings of their own for 'sliding_attention'",
    ),
    "settings by layer in the older form": (
        {"rope_scaling": {"0": {"type": "linear", "factor": 2.0}}},
        "rope_scaling has settings of their own for '0'",
    ),
    "linear without a factor": (in_parameters({"type": "linear"}), "type 'linear' needs a factor"),
    "dynamic without a factor": (
        in_parameters({"type": "dynamic", "factor": None}),
        "type 'dynamic' needs a factor",
    ),
    "llama3 without a factor": (
        in_parameters({**LLAMA3, "factor": None}),
        "type 'llama3' needs a factor",
    ),
    "llama3 without its frequencies": (
        in_parameters({"rope_type": "llama3", "factor": 8.0}),
        "type 'llama3' needs a low_freq_factor",
    ),
    "a factor of no type": (
        {"rope_scaling": {"rope_type": None, "factor": 2.0}},
        "rope_scaling has a factor, but its rope_type is null",
    ),
    "longrope": (
        in_parameters({"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}),
        "rope type 'longrope' is not supported",
    ),
    "a part of it beside": (in_parameters(YARN, partial_rotary_factor=0.5), "factor 0.5"),
}


@pytest.mark.parametrize(("changes", "words"), ROPE_REFUSED.values(), ids=ROPE_REFUSED.keys())
def test_rope_settings_are_refused_by_name(changes, words):
    with pytest.raises(InputError) as error:
        parse_config(BASE | changes)
    assert words in str(error.value)


# --- windows ---

FAMILY = {
    "llama": models.llama(),
    "mistral": models.CASES["mistral, no window"],
    "qwen2": models.CASES["qwen2.5, biases, yarn"] | {"rope_parameters": PLAIN},
    "qwen3": models.qwen3(),
}
LENGTH = 128  # the range of all of them
ON, OFF = {"use_sliding_window": True}, {"use_sliding_window": False}
FULL, SLIDING = ["full_attention"] * 2, ["full_attention", "sliding_attention"]
LLAMA_HAS_NONE = [{"sliding_window": 8} | more for more in ({}, ON, {"sliding_window": -1})]
MISTRAL = [
    *(({"sliding_window": 8} | more, True) for more in ({}, OFF, {"max_window_layers": 5})),
    ({"sliding_window": LENGTH - 1}, True),
    ({"sliding_window": LENGTH} | ON, False),
    ({"sliding_window": None} | ON, False),
    ({"sliding_window": 0}, True),
    ({"sliding_window": 8, "layer_types": FULL}, False),
    ({"sliding_window": 8, "layer_types": SLIDING}, True),
    ({"sliding_window": 8, "layer_types": None}, True),
    ({"sliding_window": LENGTH, "layer_types": SLIDING}, False),
    ({"sliding_window": None, "layer_types": SLIDING}, True),
]
QWEN = [  # changes, and whether they are refused
    ({"sliding_window": 8}, False),
    ({"sliding_window": -1} | OFF, False),
    ({"sliding_window": 8} | ON, False),  # from layer 28 on
    ({"sliding_window": 8, "max_window_layers": 2} | ON, False),
    ({"sliding_window": 8, "max_window_layers": 1} | ON, True),
    ({"sliding_window": LENGTH, "max_window_layers": 0} | ON, False),
    ({"sliding_window": LENGTH - 1, "max_window_layers": 0} | ON, True),
    ({"sliding_window": None, "max_window_layers": 0} | ON, False),
    ({"sliding_window": 8, "max_window_layers": 0, "layer_types": FULL} | ON, False),
    ({"sliding_window": 8, "layer_types": SLIDING} | ON, True),
    ({"sliding_window": 8, "layer_types": SLIDING} | OFF, True),
    ({"sliding_window": None, "layer_types": SLIDING} | ON, True),
    ({"sliding_window": 0, "max_window_layers": 0} | ON, True),
    ({"layer_types": ["full_attention", "linear_attention"]}, True),
    ({"layer_types": ["attention", "full_attention"]}, False),
    ({"layer_types": FULL[:1]}, True),
]
WINDOWS = [
    *(("llama", changes, False) for changes in LLAMA_HAS_NONE),
    *(("mistral", changes, refused) for changes, refused in MISTRAL),
    *((family, changes, refused) for family in ("qwen2", "qwen3") for changes, refused in QWEN),
]


@pytest.mark.parametrize(("family", "changes", "refused"), WINDOWS)
def test_a_window_is_refused_where_it_hides_something(family, changes, refused):
    plain = parse_config(FAMILY[family])
    assert plain.max_positions == LENGTH
    if not refused:
        assert parse_config(FAMILY[family] | changes) == plain
        return
    with pytest.raises(InputError, match=r"sliding-window|layers of type|layer_types has 1 entr"):
        parse_config(FAMILY[family] | changes)


@pytest.mark.one_in(5)
@needs_torch
@pytest.mark.parametrize(("family", "changes", "refused"), WINDOWS)
def test_transformers_applies_the_windows_that_are_refused(tmp_path, family, changes, refused):
    import torch
    import transformers

    def logits(raw: dict) -> np.ndarray:
        (tmp_path / "config.json").write_text(json.dumps(raw))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            return model(torch.tensor(tokens), use_cache=False).logits.numpy()

    models.write_hf(tmp_path, FAMILY[family])
    tokens = models.tokens(FAMILY[family], batch=1, length=LENGTH).tolist()
    plain = logits(FAMILY[family])
    try:
        differs = np.abs(logits(FAMILY[family] | changes) - plain).max() > 1e-5
    except Exception:  # what transformers itself cannot run
        differs = True
    assert differs == refused


# --- what is left open ---

OPEN = ["num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "mlp_bias"]
OPEN += ["tie_word_embeddings", "use_sliding_window", "max_window_layers", "layer_types"]
OPEN += ["partial_rotary_factor", "rope_theta", "rope_scaling", "rope_parameters", "dtype"]
OPEN += ["original_max_position_embeddings", "quantization_config", "num_experts", "use_cache"]


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("key", [*OPEN, "sliding_window"])
def test_null_is_as_good_as_the_default(family, key):
    raw = FAMILY[family] | {"num_attention_heads": 2, "num_key_value_heads": 2}
    raw |= {"tie_word_embeddings": False}
    raw |= {"head_dim": 128 if family == "qwen3" else raw["hidden_size"] // 2}
    raw |= {"rope_parameters": None}
    assert parse_config(raw | {key: None}) == parse_config(raw)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("left", [{}, {"rms_norm_eps": None, "max_position_embeddings": None}])
def test_defaults_are_those_of_transformers(family, left):
    """Conversions of the first LLaMA had their range under another name."""
    import transformers

    keys = ("rms_norm_eps", "max_position_embeddings")
    raw = {key: value for key, value in FAMILY[family].items() if key not in keys} | left
    config = parse_config(raw | {"sliding_window": None})
    theirs = transformers.AutoConfig.for_model(family)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.max_positions == theirs.max_position_embeddings


UNSEEN = {"per_layer_config": {"1": {}}, "transformers_weights": "a.safetensors"}
UNSEEN |= {"is_causal": False}


@pytest.mark.parametrize(("key", "value"), UNSEEN.items())
def test_what_would_change_the_model_unseen_is_refused(key, value):
    with pytest.raises(InputError, match=key):
        parse_config(BASE | {key: value})


WRONG = [
    "linear",
    3,
    2.5,
    -1,
    0,
    True,
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    {"rope_type": [3]},
    "",
    10**30,
]
KEYS = sorted({*BASE, *OPEN, "sliding_window", "model_type", "rope_theta", "torch_dtype"})


def complaint(raw: dict) -> str | None:
    try:
        parse_config(raw)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("key", KEYS)
def test_another_type_is_one_clear_line_or_unread(family, key):
    """No value of any key ends in anything but a config or an InputError."""
    complaints = [complaint(FAMILY[family] | {key: value}) for value in WRONG]
    assert all(len(line) < 500 and "\n" not in line for line in complaints if line)
    if key in ("rope_scaling", "rope_parameters", "hidden_size", "rope_theta", "head_dim"):
        assert complaints[0] is not None  # a word

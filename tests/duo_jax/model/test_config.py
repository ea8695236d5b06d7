"""Model configs: both forms of config.json, and what is refused."""

import copy
import dataclasses
import json

import pytest

from duo_jax.errors import InputError
from duo_jax.model.hf_config import parse_config, read_config, to_hf
from tests import models


def transformers_4(raw: dict, *, type_key: str) -> dict:
    """Rewrite a transformers 5 config.json the way transformers 4 wrote it."""
    raw = copy.deepcopy(raw)
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {type_key: kind} | rope
    return raw


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("name", models.CASES.keys())
def test_both_forms_of_config_json_are_equal(tmp_path, name, type_key):
    raw = models.CASES[name]
    older = transformers_4(raw, type_key=type_key)
    assert "rope_parameters" not in older
    for version, contents in (("5", raw), ("4", older)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "config.json").write_text(json.dumps(contents))
    config = read_config(tmp_path / "5")
    assert config == read_config(tmp_path / "4" / "config.json")
    assert config.rope.theta == raw["rope_parameters"]["rope_theta"]
    assert config.rope.kind == raw["rope_parameters"]["rope_type"]
    hash(config)  # a static argument


CONFIGS = {name: parse_config(raw) for name, raw in models.CASES.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_written_config_json_is_read_as_the_same_architecture(config):
    import transformers

    raw = json.loads(json.dumps(to_hf(config)))
    assert parse_config(raw) == config
    only_4 = {key: value for key, value in raw.items() if key != "rope_parameters"}
    assert parse_config(only_4) == config
    only_5 = {key: raw[key] for key in raw.keys() - {"rope_theta", "rope_scaling"}}
    assert parse_config(only_5) == config
    theirs = transformers.AutoConfig.for_model(**raw)
    assert parse_config(theirs.to_dict()) == config
    assert hasattr(transformers, theirs.architectures[0])


def test_an_architecture_that_no_config_json_describes():
    config = dataclasses.replace(CONFIGS["llama-3, grouped queries"], qkv_bias=True)
    with pytest.raises(ValueError, match=r"no config\.json of family 'llama' describes"):
        to_hf(config)


def test_biases_are_where_each_family_has_them():
    """Llama and Qwen3 follow attention_bias, Qwen2 has them on q, k and v, Mistral has none."""
    biases = {}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        raw = models.llama(attention_bias=True, mlp_bias=True, sliding_window=None)
        config = parse_config(raw | {"model_type": family})
        biases[family] = (config.qkv_bias, config.o_bias, config.mlp_bias)
    assert biases == {
        "llama": (True, True, True),
        "mistral": (False, False, False),
        "qwen2": (True, False, False),
        "qwen3": (True, True, False),
    }


def test_whole_numbers_are_taken_where_fractions_are_meant():
    scaling = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    scaling |= {"rope_type": "llama3", "rope_theta": 500000, "original_max_position_embeddings": 32}
    config = parse_config(models.llama(rope=scaling, head_dim=64))
    assert config == parse_config(models.CASES["llama-3.1, scaled rope"])
    assert isinstance(config.rope.high_freq_factor, float)


def without(*keys: str) -> dict:
    return {k: v for k, v in models.llama().items() if k not in keys}


MISTRAL = models.CASES["mistral, no window"]
QWEN = models.CASES["qwen2.5, biases, yarn"]
QWEN3 = models.CASES["qwen3, norms on q and k"]
REFUSED = {
    "qwen3_moe": (
        QWEN3 | {"model_type": "qwen3_moe", "num_experts": 128},
        ("qwen3_moe", "mixture of experts"),
    ),
    "mixtral": (
        models.llama() | {"model_type": "mixtral", "num_local_experts": 8},
        ("mixtral", "mixture of experts"),
    ),
    "deepseek_v3": (
        models.llama()
        | {"model_type": "deepseek_v3", "n_routed_experts": 256, "kv_lora_rank": 512},
        ("deepseek_v3", "multi-head latent attention (MLA)", "mixture of experts"),
    ),
    "gemma2": (
        models.llama() | {"model_type": "gemma2", "attn_logit_softcapping": 50.0},
        ("gemma2", "soft-capping"),
    ),
    "phi3": (
        models.llama() | {"model_type": "phi3"},
        ("phi3", "supported: llama, mistral, qwen2, qwen3"),
    ),
    "no model type": (without("model_type"), ("no model_type", "supported: llama")),
    "mistral v0.1, window of 4096": (
        MISTRAL | {"sliding_window": 4096, "max_position_embeddings": 32768},
        ("sliding-window attention (window 4096)", "v0.2 and v0.3"),
    ),
    "mistral without the key: transformers' default window": (
        {k: v for k, v in MISTRAL.items() if k != "sliding_window"}
        | {"max_position_embeddings": 32768},
        ("window 4096",),
    ),
    "qwen with its window switched on": (
        QWEN3 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
        ("sliding-window attention (window 64)", "use_sliding_window false"),
    ),
    "a window shorter than the range after scaling": (
        QWEN
        | {"use_sliding_window": True, "sliding_window": 100, "max_position_embeddings": 32}
        | {"max_window_layers": 1},
        ("window 100",),
    ),
    "layer_types with sliding_attention": (
        QWEN
        | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}
        | {"use_sliding_window": None},
        ("sliding-window attention (window 64)",),
    ),
    "longrope": (
        models.llama(rope={"rope_type": "longrope"}),
        ("rope type 'longrope'", "default, linear, dynamic, llama3, yarn"),
    ),
    "partial rotary": (
        models.llama(rope={"partial_rotary_factor": 0.5}),
        ("partial rotary embedding (factor 0.5)",),
    ),
    "partial rotary, transformers 4": (
        models.llama(partial_rotary_factor=0.25),
        ("partial rotary embedding (factor 0.25)",),
    ),
    "activation": (models.llama(hidden_act="gelu"), ("activation 'gelu'", "silu")),
    "quantised weights": (
        models.llama(quantization_config={"quant_method": "awq"}),
        ("quantised by another tool (quantization_config)",),
    ),
    "missing keys, all of them": (
        without("hidden_size", "vocab_size", "num_hidden_layers"),
        ("lacks vocab_size, hidden_size, num_hidden_layers",),
    ),
    "a text where a number is needed": (
        models.llama(hidden_size="4096"),
        ("hidden_size is '4096'", "expected a whole number"),
    ),
    "a negative size": (models.llama(num_key_value_heads=-1), ("num_key_value_heads is -1",)),
    "heads that do not divide": (
        models.llama(num_attention_heads=5, head_dim=8),
        ("5 query heads cannot be shared by 2 KV heads",),
    ),
    "width that heads do not divide": (
        models.llama(num_attention_heads=6),
        ("hidden_size 32 is not a multiple of num_attention_heads 6", "no head_dim"),
    ),
    "odd head_dim": (models.llama(head_dim=7), ("head_dim 7 is odd",)),
}


@pytest.mark.parametrize(("raw", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_supported_is_refused_by_name(raw, words):
    with pytest.raises(InputError) as error:
        parse_config(raw)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_window_as_long_as_the_range_hides_nothing():
    plain = parse_config(MISTRAL)
    assert parse_config(MISTRAL | {"sliding_window": MISTRAL["max_position_embeddings"]}) == plain
    with pytest.raises(InputError):
        parse_config(MISTRAL | {"sliding_window": MISTRAL["max_position_embeddings"] - 1})


@pytest.mark.parametrize("contents", [b"{", b"\xff\xfe", b"[]", b"null"])
def test_not_a_json_object_is_one_clear_line(tmp_path, contents):
    (tmp_path / "config.json").write_bytes(contents)
    with pytest.raises(InputError, match=r"config\.json") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_no_file_and_no_access_are_clear_lines(tmp_path):
    with pytest.raises(InputError, match=r"does not exist; a model folder has a config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path)

"""The split of a model: counts per layer, and parameters reordered without changing the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.errors import InputError
from duo_jax.heads.pattern import choose_retrieval_heads, load_pattern
from duo_jax.heads.split import DuoConfig, duo_config, head_order, reorder_layer, split_params
from duo_jax.model import llama
from duo_jax.model.hf_config import parse_config
from tests import models
from tests.duo_jax.heads.test_pattern import COUNTS, needs_published, published
from tests.params import random_params

RAW = models.llama(num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3)
CONFIG = parse_config(RAW)
SIZES = {"sink_size": 4, "recent_size": 6}
# None, some and all heads of a layer.
MIXED = np.array([[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]], bool)


def snapshot(params):
    return jax.tree.map(lambda x: np.array(x, copy=True), params)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- counts


def test_counts_are_those_of_each_layer():
    config = duo_config(CONFIG, MIXED, **SIZES)
    assert config.retrieval_counts == (0, 2, 4)
    assert config.num_retrieval_heads == 6
    assert config.ring_slots == 10
    assert {config: "hashable"}[duo_config(CONFIG, MIXED.copy(), **SIZES)] == "hashable"


@pytest.mark.parametrize("kept", range(13))
def test_any_number_of_heads_can_be_kept(kept):
    gates = np.random.default_rng(kept).random((3, 4))
    config = duo_config(CONFIG, choose_retrieval_heads(gates, sparsity=1 - kept / 12), **SIZES)
    assert config.num_retrieval_heads == kept


@needs_published
@pytest.mark.parametrize("name", COUNTS)
def test_published_patterns_give_the_counts_of_the_spec(name):
    sparsity, counts = COUNTS[name]
    gates = load_pattern(published(name)).gates
    layers, kv_heads = gates.shape
    raw = models.llama(
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=kv_heads,
        head_dim=128,
    )
    config = duo_config(
        parse_config(raw),
        choose_retrieval_heads(gates, sparsity=sparsity),
        sink_size=128,
        recent_size=256,
    )
    assert " ".join(map(str, config.retrieval_counts)) == counts


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"retrieval_counts": (1, 1)}, "given for 2 layers, the model has 3"),
        ({"retrieval_counts": (0, 5, 1)}, "0 to 4 retrieval heads, not 5"),
        ({"retrieval_counts": (0, -1, 4)}, "0 to 4 retrieval heads, not -1"),
        ({"sink_size": -1}, "sink_size -1 is not a whole number from 0"),
        ({"recent_size": 0}, "recent_size 0 is not a whole number from 1"),
    ],
    ids=["layers", "too many heads", "negative heads", "sink", "recent"],
)
def test_an_impossible_split_is_refused_in_one_line(wrong, message):
    with pytest.raises(InputError, match=message) as error:
        DuoConfig(**{"architecture": CONFIG, "retrieval_counts": (0, 2, 4)} | SIZES | wrong)
    assert "\n" not in str(error.value)


# ---- reordering


def at_least_two_kv_heads(raw: dict) -> dict:
    return raw | {"num_key_value_heads": max(2, raw["num_key_value_heads"])}


REORDERED = ["llama, multi-query, biases", "qwen3, norms on q and k"]  # and what others have


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x not in REORDERED)) for x in models.CASES]
)
def test_the_reordered_model_computes_the_same_logits(name):
    config = parse_config(at_least_two_kv_heads(models.CASES[name]))
    params = random_params(config)
    heads = np.zeros((config.num_layers, config.num_kv_heads), bool)
    heads[0, -1] = heads[1, 1::2] = True  # in neither layer the first head
    layers = split_params(config, params, heads)["layers"]
    reordered = {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
        before, after = (x["layers"]["self_attn"][module]["kernel"] for x in (params, reordered))
        assert not np.array_equal(before, after)

    @jax.jit
    def logits(params, tokens):
        x, _ = llama.hidden_states(config, params, tokens)
        return llama.logits(config, params, x)

    tokens = jnp.asarray(models.tokens(models.CASES[name], length=20))
    expected = logits(params, tokens)
    np.testing.assert_allclose(logits(reordered, tokens), expected, atol=3e-5)


def test_retrieval_heads_come_first_and_keep_their_order():
    config = parse_config(models.llama(num_attention_heads=8, num_key_value_heads=4))
    heads = np.array([False, True, False, True])
    assert head_order(config, ("k_proj", "kernel"), heads).indices.tolist() == [1, 3, 0, 2]
    q_order = head_order(config, ("q_proj", "kernel"), heads)
    assert q_order.indices.tolist() == [2, 3, 6, 7, 0, 1, 4, 5]
    assert head_order(config, ("o_proj", "kernel"), heads).axis == 0


@pytest.mark.parametrize("as_numpy", [False, True], ids=["jax", "numpy"])
def test_the_callers_parameters_stay_intact(as_numpy):
    config = parse_config(models.llama(attention_bias=True, num_key_value_heads=2))
    params = random_params(config)
    if as_numpy:
        params = jax.tree.map(np.asarray, params)
    before = snapshot(params)
    heads = np.array([[False, True], [True, False]])
    split = split_params(config, params, heads)
    # Whoever gives the split parameters' own arrays away does not lose the caller's.
    for layer in split["layers"]:
        jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, layer)
    assert_same(params, before)
    assert split["embed_tokens"] is params["embed_tokens"]
    assert isinstance(params["layers"], dict)


def test_numpy_and_jax_parameters_split_alike():
    params = random_params(CONFIG)
    from_jax = split_params(CONFIG, params, MIXED)
    from_numpy = split_params(CONFIG, jax.tree.map(np.asarray, params), MIXED)
    assert_same(from_numpy, from_jax)
    for a, b in zip(jax.tree.leaves(from_numpy), jax.tree.leaves(from_jax), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_layer_in_order_already_is_not_copied():
    layer = jax.tree.map(lambda leaf: leaf[0], random_params(CONFIG)["layers"])
    for heads in ([0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]):
        got = reorder_layer(CONFIG, layer, np.array(heads, bool))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(layer), strict=True):
            assert a is b

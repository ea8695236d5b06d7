"""Quantised weights: bounds of the error, exact products, and the model that computes with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main as convert
from duo_jax import api as model
from duo_jax import generate, serve
from duo_jax.cache import init_cache
from duo_jax.checkpoints import pretrained
from duo_jax.cli import model_flags
from duo_jax.errors import InputError
from duo_jax.heads import split
from duo_jax.model.hf_config import parse_config
from duo_jax.model.quantised_linear import FEW_ROWS, product, quantise_rows
from duo_jax.model.quantised_weights import (
    QuantisedKernel,
    dequantise,
    format_of,
    group_size,
    quantise,
    quantise_params,
)
from duo_jax.serve import ahead_of_time as compiled
from duo_jax.session.runtime import Runtime
from tests import models
from tests.params import random_params

STORED = ["int8", "int4"]
FORMATS = ["int8", "w8a8", "int4"]
LEVELS = {"int8": 127, "int4": 7}
# Module, shape of its weights, number of input axes, shape of the scales in int8 and int4.
KERNELS = {
    "gate": ("gate_proj", (256, 40), 1, (1, 40), (2, 40)),
    "group of 96": ("gate_proj", (96, 40), 1, (1, 40), (1, 40)),
    "group of 100": ("down_proj", (300, 24), 1, (1, 24), (3, 24)),
    "keys": ("k_proj", (256, 2, 24), 1, (1, 2, 24), (2, 2, 24)),
    "o_proj, groups within heads": ("o_proj", (4, 32, 24), 2, (1, 1, 24), (4, 1, 24)),
    "o_proj, two groups a head": ("o_proj", (2, 256, 24), 2, (1, 1, 24), (2, 2, 24)),
}
kernels = pytest.mark.parametrize(
    ("module", "shape", "inputs", "int8_scales", "int4_scales"),
    KERNELS.values(),
    ids=KERNELS.keys(),
)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def on_device(kernel: QuantisedKernel) -> QuantisedKernel:
    return jax.tree.map(jnp.asarray, kernel)


# ---- quantising


@pytest.mark.one_in(5)
@kernels
@pytest.mark.parametrize("weights", STORED)
@pytest.mark.parametrize("strided", [False, True])
def test_the_error_is_at_most_half_a_step(
    module, shape, inputs, int8_scales, int4_scales, weights, strided
):
    kernel = normal(*shape) * np.exp(normal(*shape[inputs:], seed=1))  # channels of many sizes
    if strided:
        kernel = np.asfortranarray(kernel)
    quantised = quantise(kernel, module=module, weight_format=weights)
    scales = quantised.scales
    assert scales.shape == {"int8": int8_scales, "int4": int4_scales}[weights]
    assert quantised.values.dtype.name == weights
    values = quantised.values.astype(np.int32)
    assert np.abs(values).max() == LEVELS[weights]  # the range is used
    wide = scales
    for axis, (size, groups) in enumerate(zip(shape, scales.shape, strict=True)):
        wide = np.repeat(wide, size // groups, axis=axis)
    error = np.abs(values * wide.astype(np.float64) - kernel)
    assert (error <= wide / 2 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(
        dequantise(on_device(quantised)), values.astype(np.float32) * wide
    )


@pytest.mark.parametrize("weights", STORED)
def test_a_channel_of_zeros_stays_zero(weights):
    kernel = normal(32, 3)
    kernel[:, 1] = 0
    back = np.asarray(
        dequantise(on_device(quantise(kernel, module="up_proj", weight_format=weights)))
    )
    assert (back[:, 1] == 0).all()
    assert (back[:, [0, 2]] != 0).any()


@pytest.mark.parametrize("weights", STORED)
def test_blocks_do_not_show(weights, monkeypatch):
    kernel = normal(64, 50)
    whole = quantise(kernel, module="up_proj", weight_format=weights)
    monkeypatch.setattr("duo_jax.model.quantised_weights._BLOCK_SIZE", 64 * 7)
    parts = quantise(kernel, module="up_proj", weight_format=weights)
    np.testing.assert_array_equal(parts.values, whole.values)
    np.testing.assert_array_equal(parts.scales, whole.scales)


def test_what_is_representable_comes_back_exactly():
    for weights, largest in LEVELS.items():
        values = np.random.default_rng(0).integers(-largest, largest + 1, (128, 5))
        values[0] = largest
        kernel = (values * np.float32(0.25)).astype(np.float32)
        quantised = on_device(quantise(kernel, module="up_proj", weight_format=weights))
        np.testing.assert_array_equal(dequantise(quantised), kernel)


@pytest.mark.parametrize(
    ("axis", "size"), [(14_336, 128), (11_008, 128), (80, 80), (192, 96), (300, 100), (8, 8)]
)
def test_groups_are_the_largest_that_divide(axis, size):
    assert group_size(axis) == size


def test_what_cannot_be_quantised_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"groups of 16 to 128 inputs, into which 262 .* use int8"):
        quantise(normal(262, 3), module="up_proj", weight_format="int4")
    broken = normal(32, 3)
    broken[3, 1] = np.nan
    with pytest.raises(InputError, match="layers 7 has values that are not finite"):
        quantise(broken, module="up_proj", weight_format="int8", name="layers 7")


# ---- products


@pytest.mark.one_in(5)
@kernels
@pytest.mark.parametrize("weights", STORED)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_weight_only_products_are_those_of_the_dequantised_weights(
    module, shape, inputs, int8_scales, int4_scales, weights, rows
):
    del int8_scales, int4_scales
    kernel = on_device(quantise(normal(*shape), module=module, weight_format=weights))
    x = jnp.asarray(normal(rows, 1, *shape[:inputs], seed=2))
    out = product(x, kernel, inputs=inputs, wide=jnp.float32)
    axes = (tuple(range(2, 2 + inputs)), tuple(range(inputs)))
    expected = np.tensordot(x, np.asarray(dequantise(kernel), np.float64), axes)
    assert out.shape == (rows, 1, *shape[inputs:])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_w8a8_is_the_integer_product_exactly(rows):
    kernel = on_device(quantise(normal(200, 24), module="up_proj", weight_format="w8a8"))
    x = jnp.asarray(normal(rows, 200, seed=3) * np.array([[1], [100], [0.01]])[:rows], jnp.float32)
    quantised, scales = map(np.asarray, quantise_rows(x))
    assert (np.abs(quantised).max(axis=1) == 127).all()
    assert (np.abs(quantised * scales - np.asarray(x)) <= scales * 0.5001).all()
    exact = quantised.astype(np.int64) @ np.asarray(kernel.values, np.int64)
    out = product(x, kernel, inputs=1, wide=jnp.float32)
    np.testing.assert_array_equal(out, exact.astype(np.float32) * scales * kernel.scales)


def test_w8a8_rows_have_scales_of_their_own():
    kernel = on_device(quantise(normal(64, 8), module="up_proj", weight_format="w8a8"))
    x = normal(2, 64, seed=4)
    alone = product(jnp.asarray(x[:1]), kernel, inputs=1, wide=jnp.float32)
    x[1] *= 1e4
    together = product(jnp.asarray(x), kernel, inputs=1, wide=jnp.float32)
    np.testing.assert_array_equal(together[:1], alone)
    nothing = product(jnp.zeros((2, 64)), kernel, inputs=1, wide=jnp.float32)
    assert (nothing == 0).all()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("rows", [1, 6])
def test_bfloat16_is_rounded_once(weights, rows):
    """Sums and scales are float32: a bfloat16 result is as close as bfloat16 allows."""
    kernel = on_device(quantise(normal(256, 32), module="up_proj", weight_format=weights))
    x = jnp.asarray(normal(rows, 256, seed=5), jnp.bfloat16)
    wide = product(x.astype(jnp.float32), kernel, inputs=1, wide=jnp.float32)
    narrow = product(x, kernel, inputs=1, wide=jnp.float32)
    assert narrow.dtype == jnp.float32
    # Only int4 for many rows rounds the weights themselves.
    bound = 2e-3 if weights == "int4" and rows == 6 else 1e-6
    assert np.linalg.norm(narrow - wide) <= bound * np.linalg.norm(wide)


# ---- models


def raw_model(raw: dict) -> dict:
    return raw | {"num_key_value_heads": max(2, raw["num_key_value_heads"])}


MODELS = {
    name: raw_model(models.CASES[name])
    for name in (
        "llama, multi-query, biases",
        "qwen2.5, biases, yarn",
        "qwen3, norms on q and k",
    )
}
every_model = pytest.mark.parametrize("raw", MODELS.values(), ids=MODELS.keys())


def mixed_heads(config):
    heads = np.zeros((config.num_layers, config.num_kv_heads), bool)
    heads[0, -1] = heads[1:, 1::2] = True  # in neither layer the first head
    return heads


def serving(config, heads):
    return split.duo_config(config, heads, sink_size=2, recent_size=5)


def read(config, params, tokens, *, chunks):
    """Return the logits after every chunk."""
    cache = init_cache(config, batch_size=len(tokens), max_len=64)
    step = jax.jit(serve.prefill, static_argnames="config")
    outputs, start = [], 0
    for size in chunks:
        piece = jnp.asarray(tokens[:, start : start + size])
        out, cache = step(config, params, cache, piece, jnp.full(len(tokens), size, jnp.int32))
        outputs.append(out)
        start += size
    return outputs


def relative_error(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raw", "weights"),
    [(MODELS["llama, multi-query, biases"], weights) for weights in FORMATS]
    # What is theirs alone is quantised in test_quantising_and_reordering_commute.
    + [(raw, "int4") for name, raw in MODELS.items() if "llama" not in name],
    ids=lambda x: x if isinstance(x, str) else x["model_type"],
)
def test_quantised_models_are_close_and_each_format_is_its_own(raw, weights, tmp_path):
    folder = models.write_hf(tmp_path, raw | {"num_hidden_layers": 1})
    config = pretrained.load_config(folder)
    heads = mixed_heads(config)
    tokens = models.tokens(raw, length=20)

    def logits(weights):
        params = pretrained.load_split_params(folder, heads, weights=weights)
        assert format_of(params) == weights
        return read(serving(config, heads), params, tokens, chunks=[20])[0]

    error = relative_error(logits(weights), logits("model"))
    # Random weights of tiny width are the worst case.
    low, high = {"int8": (1e-4, 0.04), "w8a8": (1e-3, 0.06), "int4": (0.02, 0.7)}[weights]
    assert low < error < high


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_chunks_and_single_tokens_equal_one_forward(weights):
    config = parse_config(MODELS["qwen3, norms on q and k"] | {"num_hidden_layers": 1})
    heads = np.array([[False, True]])
    params = quantise_params(split.split_params(config, random_params(config), heads), weights)
    tokens = models.tokens(models.CASES["qwen3, norms on q and k"], length=20)
    duo = serving(config, heads)
    whole = read(duo, params, tokens, chunks=[20])[-1]
    parts = read(duo, params, tokens, chunks=[9, 9, 1, 1])[-1]
    np.testing.assert_allclose(parts, whole, atol=2e-4)


@pytest.mark.one_in(4)
@every_model
@pytest.mark.parametrize("weights", FORMATS)
def test_quantising_and_reordering_commute(raw, weights):
    config = parse_config(raw)
    heads = mixed_heads(config)
    keep = np.ones_like(heads)
    params = random_params(config)
    after = quantise_params(split.split_params(config, params, heads), weights)
    before = quantise_params(split.split_params(config, params, keep), weights)
    layers = tuple(
        split.reorder_layer(config, layer, row)
        for layer, row in zip(before["layers"], heads, strict=True)
    )
    assert jax.tree.structure(layers) == jax.tree.structure(after["layers"])
    for got, want in zip(jax.tree.leaves(layers), jax.tree.leaves(after["layers"]), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    kernel = before["layers"][0]["self_attn"]["q_proj"]["kernel"]
    assert not np.array_equal(layers[0]["self_attn"]["q_proj"]["kernel"].values, kernel.values)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("weights", ["model", *FORMATS])
def test_only_projections_are_quantised_and_shapes_are_known_beforehand(weights, tmp_path):
    raw = MODELS["llama, multi-query, biases"]
    folder = models.write_hf(tmp_path, raw, dtype="bfloat16")
    config = pretrained.load_config(folder)
    params = pretrained.load_split_params(folder, mixed_heads(config), weights=weights)
    shapes = compiled.param_shapes(config, jnp.bfloat16, weights=weights)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    quantised = {
        jax.tree_util.keystr(path[2:4])
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.dtype != jnp.bfloat16
    }
    projections = [f"['self_attn']['{name}_proj']" for name in "qkvo"]
    projections += [f"['mlp']['{name}_proj']" for name in ("gate", "up", "down")]
    assert quantised == (set() if weights == "model" else set(projections))


@pytest.mark.parametrize("weights", STORED)
def test_weights_are_quantised_from_what_is_stored(weights, tmp_path):
    """A narrower --dtype for the rest must not change them."""
    folder = models.write_hf(tmp_path, models.llama())
    heads = np.ones((2, 2), bool)
    narrow = pretrained.load_split_params(folder, heads, dtype=jnp.bfloat16, weights=weights)
    wide = pretrained.load_split_params(folder, heads, weights=weights)
    for a, b in zip(
        jax.tree.leaves(narrow["layers"]), jax.tree.leaves(wide["layers"]), strict=True
    ):
        if a.dtype != jnp.bfloat16:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert narrow["norm"]["scale"].dtype == jnp.bfloat16


# ---- by name


def test_load_knows_the_formats():
    with pytest.raises(
        InputError, match="weight format 'int3' is not one of model, int8, w8a8, int4"
    ):
        model.load("demo", weights="int3")


@pytest.mark.slow
def test_a_saved_cache_belongs_to_its_format(tmp_path):
    """Conversations compare this digest; w8a8 has the leaves of int8, and another result."""
    folder = models.write_hf(tmp_path, models.llama())
    config = pretrained.load_config(folder)
    heads = np.ones((2, 2), bool)

    def digest(weights):
        params = pretrained.load_split_params(folder, heads, weights=weights)
        runtime = Runtime(config=serving(config, heads), params=params)
        assert runtime.weight_format == weights
        assert runtime.dtype == np.float32
        return runtime.weights_digest

    assert len({digest(weights) for weights in ("model", *FORMATS)}) == 4
    assert digest("int4") == digest("int4")


def test_the_flag_reaches_the_model(monkeypatch):
    asked = []

    def load(*, model, weights, **settings):
        del settings
        asked.append((model, weights))
        raise InputError("enough")

    monkeypatch.setattr(model_flags, "load", load)
    for weights in ("int8", "w8a8"):
        with pytest.raises(InputError, match="enough"):
            generate.generate(generate.GenerateConfig(prompt="x", weights=weights))
    with pytest.raises(InputError, match="enough"):
        generate.generate(generate.GenerateConfig(prompt="x"))
    assert asked == [("demo", "int8"), ("demo", "w8a8"), ("demo", "model")]


@pytest.mark.slow  # tests/docs/test_tables.py computes its error in every format
def test_the_demo_model_answers_in_four_bits(capfd):
    generate.main(["--max-new-tokens", "8", "--weights", "int4"])
    assert "function arguments version twelf implement keyword parameter" in capfd.readouterr().out


@pytest.mark.one_in(2)
@pytest.mark.parametrize("weights", STORED)
def test_a_quantised_checkpoint_serves_what_quantising_on_load_serves(weights, tmp_path):
    raw = MODELS["llama, multi-query, biases"]
    folder = models.write_hf(tmp_path / "hf", raw, dtype="bfloat16")
    convert([str(folder), str(tmp_path / "small"), "--weights", weights])
    marker = json.loads((tmp_path / "small" / "duo_jax.json").read_text())
    described = {"format": "duo_jax checkpoint", "version": 2, "weights": weights}
    assert marker == marker | described
    config = pretrained.load_config(folder)
    heads = mixed_heads(config)
    for served in {"int8": ["int8", "w8a8"], "int4": ["int4"]}[weights]:
        direct = pretrained.load_split_params(folder, heads, weights=served)
        stored = pretrained.load_split_params(tmp_path / "small", heads, weights=served)
        assert jax.tree.structure(direct) == jax.tree.structure(stored)
        for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(stored), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

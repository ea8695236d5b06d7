"""The table of tensor names against hand-written layouts, the model's tree and transformers."""

import importlib.util

import jax
import numpy as np
import pytest

from duo_jax.checkpoints import tensor_names
from duo_jax.checkpoints.orbax_checkpoint import flattened, stored_path
from duo_jax.errors import InputError
from duo_jax.model import llama
from duo_jax.model.hf_config import parse_config
from tests import models

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
every_family = pytest.mark.parametrize("raw", models.CASES.values(), ids=models.CASES.keys())

HEADS, KV_HEADS, DIM, EMBED = 4, 2, 24, 40  # those of models.qwen3()


def by_name(raw: dict) -> dict[str, tensor_names.Tensor]:
    return {tensor.name: tensor for tensor in tensor_names.tensors(parse_config(raw))}


@pytest.mark.parametrize(
    ("name", "ours_of"),
    {
        # our index -> the Hugging Face index that holds the same value
        "self_attn.q_proj.weight": lambda e, h, d: (h * DIM + d, e),
        "self_attn.k_proj.weight": lambda e, h, d: (h * DIM + d, e),
        "self_attn.v_proj.weight": lambda e, h, d: (h * DIM + d, e),
        "self_attn.o_proj.weight": lambda h, d, e: (e, h * DIM + d),
        "self_attn.q_proj.bias": lambda h, d: (h * DIM + d,),
        "self_attn.k_proj.bias": lambda h, d: (h * DIM + d,),
        "self_attn.o_proj.bias": lambda e: (e,),
        "self_attn.q_norm.weight": lambda d: (d,),
        "mlp.up_proj.weight": lambda e, f: (f, e),
        "mlp.down_proj.weight": lambda f, e: (e, f),
        "input_layernorm.weight": lambda e: (e,),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_value_lands_where_it_belongs(name, ours_of):
    tensor = by_name(models.qwen3(attention_bias=True))[f"model.layers.1.{name}"]
    theirs = np.arange(tensor.size, dtype=np.float32).reshape(tensor.hf_shape)
    ours = tensor.from_hf(theirs)
    assert ours.shape == tensor.shape
    for index in np.ndindex(ours.shape):
        assert ours[index] == theirs[ours_of(*index)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (96, EMBED)),
        ("model.layers.0.self_attn.q_proj.weight", (EMBED, HEADS, DIM)),
        ("model.layers.0.self_attn.v_proj.weight", (EMBED, KV_HEADS, DIM)),
        ("model.layers.0.self_attn.o_proj.weight", (HEADS, DIM, EMBED)),
        ("model.layers.0.self_attn.k_norm.weight", (DIM,)),
        ("model.norm.weight", (EMBED,)),
        ("lm_head.weight", (EMBED, 96)),
    ],
)
def test_shapes_in_our_tree(name, shape):
    assert by_name(models.qwen3())[name].shape == shape


@every_family
def test_names_and_shapes_are_those_of_the_files(raw):
    expected = {name: array.shape for name, array in models.hf_tensors(raw).items()}
    assert {name: tensor.hf_shape for name, tensor in by_name(raw).items()} == expected


@needs_torch
@every_family
def test_names_and_shapes_are_those_of_transformers(raw):
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if raw["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert {name: tensor.hf_shape for name, tensor in by_name(raw).items()} == expected


@pytest.mark.one_in(3)
@every_family
def test_tree_is_that_of_the_model(raw):
    config = parse_config(raw)
    tree = jax.eval_shape(lambda key: llama.init_params(config, key), jax.random.key(0))
    expected = {path: leaf.shape for path, leaf in flattened(tree).items()}
    found = {}
    for tensor in tensor_names.tensors(config):
        layers = () if tensor.layer is None else (config.num_layers,)
        found[tensor.path] = (*layers, *tensor.shape)
    assert found == expected


@every_family
@pytest.mark.parametrize("word", [np.uint16, np.uint32])
def test_round_trip_keeps_every_bit(raw, word):
    rng = np.random.default_rng(0)
    for tensor in by_name(raw).values():
        theirs = rng.integers(0, np.iinfo(word).max, tensor.hf_shape, word, endpoint=True)
        back = tensor.to_hf(tensor.from_hf(theirs))
        assert back.flags.c_contiguous
        np.testing.assert_array_equal(back, theirs)


def test_order_is_that_of_the_forward_pass():
    layers = [tensor.layer for tensor in tensor_names.tensors(parse_config(models.llama()))]
    assert layers == [None] + [0] * 9 + [1] * 9 + [None, None]


def test_paths_with_layers_apart_are_unique():
    found = [stored_path(t) for t in tensor_names.tensors(parse_config(models.llama()))]
    assert len(set(found)) == len(found)
    assert ("layers", "1", "mlp", "up_proj", "kernel") in found


def test_another_shape_is_refused():
    tensor = by_name(models.llama())["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(ValueError, match=r"q_proj.weight: array.shape=\(32, 31\)"):
        tensor.from_hf(np.zeros((32, 31)))
    with pytest.raises(ValueError, match=r"q_proj.weight: array.shape=\(32, 32\)"):
        tensor.to_hf(np.zeros((32, 32)))


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("lm_head.weight", False),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", True),
        ("model.layers.3.self_attn.rotary_emb.cos_cached", True),
        ("_orig_mod.model.layers.3.self_attn.rotary_emb.sin_cached", True),
        ("rotary_emb.original_inv_freq", True),
        ("rope.freqs", True),
        ("model.causal_mask", True),
        ("model.layers.3.self_attn.masked_bias", True),
        ("model.layers.3.attn.bias", True),
        ("layers.3.attention.bias", True),
        ("model.layers.3.self_attn.q_proj.bias", False),
        ("model.layers.3.self_attn.q_norm.weight", False),
        ("model.layers.3.mlp.bias", False),
    ],
)
def test_what_a_file_may_hold_besides(name, buffer):
    assert tensor_names.is_buffer(name) == buffer


def test_names_in_files_mean_tensors_of_the_model():
    expected = ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
    names = ["_orig_mod.norm.weight", "module.model.lm_head.weight", "score.weight"]
    names += ["model.model.embed_tokens.weight"]
    assert tensor_names.in_file(names, expected) == {
        "model.norm.weight": "_orig_mod.norm.weight",
        "lm_head.weight": "module.model.lm_head.weight",
        "score.weight": "score.weight",
        "model.embed_tokens.weight": "model.model.embed_tokens.weight",
    }
    with pytest.raises(InputError, match=r"^'norm.weight' and 'model.norm.weight' are both model"):
        tensor_names.in_file(["model.norm.weight", "norm.weight"], expected)

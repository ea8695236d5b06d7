"""GGUF files: the weights and configs that they hold, and what is refused."""

import dataclasses
import functools
import math
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.checkpoints import pretrained
from duo_jax.checkpoints.gguf import GgufTensors, header, is_gguf, read_config, read_header
from duo_jax.checkpoints.orbax_checkpoint import flattened
from duo_jax.checkpoints.weights import open_weights
from duo_jax.errors import InputError
from duo_jax.model import llama
from duo_jax.model.hf_config import parse_config
from tests import gguf_files, models
from tests.golden import generate

gguf = gguf_files.gguf

Type = gguf.GGMLQuantizationType
# Those that the package itself turns into numbers.
_NOT_WEIGHTS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0"}
TYPES = [kind for kind in Type if kind.name not in _NOT_WEIGHTS]
# GGUF has no biases of o_proj and of the MLP that need a test of their own, and no dynamic scaling
# nor mscales.
CASES = [name for name in models.CASES if "dynamic" not in name and "mscale" not in name]
LLAMA = models.CASES["llama-3, grouped queries"]


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens):
    return llama.Llama(config).apply({"params": params}, tokens, None, None)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.one_in(3)
@pytest.mark.core
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(tmp_path, name):
    """Whatever the file says in its own words: permuted rows, factors, ties, biases, norms."""
    raw = models.CASES[name]
    file = tmp_path / "model.gguf"
    gguf_files.write(file, raw)
    config = pretrained.load_config(file)
    logits = logits_of(
        config, pretrained.load_params(file), jnp.asarray(models.tokens(raw, batch=1))
    )
    with np.load(generate.FILE) as golden:
        assert relative_error(np.asarray(logits), golden[f"{name}/logits"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_configs_are_those_of_config_json(tmp_path, name):
    raw = models.CASES[name]
    gguf_files.write(tmp_path / "model.gguf", raw)
    expected = parse_config(raw)
    if expected.family == "mistral":  # llama.cpp calls it llama, and it is
        expected = dataclasses.replace(expected, family="llama")
    assert read_config(tmp_path / "model.gguf") == expected


def test_other_numbers_of_llama_3_are_found_again(tmp_path):
    rope = LLAMA["rope_parameters"] | {"rope_type": "llama3", "factor": 32.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 3.0}
    rope |= {"original_max_position_embeddings": 1000}
    raw = LLAMA | {"head_dim": 128, "rope_parameters": rope}
    gguf_files.write(tmp_path / "model.gguf", raw)
    found = read_config(tmp_path / "model.gguf").rope
    assert (found.kind, found.factor, found.high_freq_factor) == ("llama3", 32.0, 3.0)
    assert found.original_max_positions == 1000


@pytest.mark.parametrize(
    ("scaling", "kind"), [("none", "default"), ("linear", "linear"), (None, "linear")]
)
def test_a_factor_counts_unless_its_type_is_none(tmp_path, scaling, kind):
    def add(writer) -> None:
        writer.add_rope_scaling_factor(2.0)
        if scaling is not None:
            writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))

    gguf_files.write(tmp_path / "model.gguf", LLAMA, change=add)
    assert read_config(tmp_path / "model.gguf").rope.kind == kind


def test_numbers_that_llama_does_not_have_are_refused(tmp_path):
    gguf_files.write(
        tmp_path / "model.gguf",
        LLAMA,
        change=lambda writer: writer.add_float32("llama.attn_logit_softcapping", 50.0),
    )
    with pytest.raises(InputError, match=r"llama\.attn_logit_softcapping 50\.0 is not supported"):
        read_config(tmp_path / "model.gguf")


def of_every_type(kind) -> np.ndarray:
    """Return bytes of 3 rows of 256 numbers, with scales that are finite in most types."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    data = rng.integers(0, 60, (256, 256 // block * size), np.uint8)
    return data.view(np.float32) if kind == Type.F32 else data


def test_numbers_of_every_type_are_those_of_the_package(tmp_path):
    """One layer for each type: its gate holds blocks of it."""
    raw = models.llama(
        hidden_size=256, intermediate_size=256, num_hidden_layers=len(TYPES), vocab_size=8
    )
    raw |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    blocks = {f"blk.{i}.ffn_gate.weight": of_every_type(kind) for i, kind in enumerate(TYPES)}
    kinds = {f"blk.{i}.ffn_gate.weight": kind for i, kind in enumerate(TYPES)}
    write_with(tmp_path / "model.gguf", raw, blocks, kinds)
    weights = open_weights(tmp_path / "model.gguf")
    tensors = GgufTensors(tmp_path / "model.gguf")
    read = {tensor.name: tensors.read(tensor.name) for tensor in weights.tensors}
    theirs = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert len(theirs) == len(read)
    for i, kind in enumerate(TYPES):
        name = f"blk.{i}.ffn_gate.weight"
        [stored] = [tensor for tensor in theirs if tensor.name == name]
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(stored.data, kind)
        found = read[f"model.layers.{i}.mlp.gate_proj.weight"]
        assert found.shape == (256, 256), kind.name
        np.testing.assert_array_equal(found.astype(np.float32), expected, err_msg=kind.name)
        assert weights.dtype(weights.tensors[0]) == np.float32


def write_with(path, raw, blocks, kinds):
    """Write a model some of whose tensors are these blocks."""
    add = gguf.GGUFWriter.add_tensor

    def instead(writer, name, data, raw_dtype=None):
        if name in blocks:
            data, raw_dtype = blocks[name], kinds[name]
        add(writer, name, data, raw_dtype=raw_dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", instead)
        gguf_files.write(path, raw)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "BF16", "F16"])
def test_leaves_are_the_dequantised_weights(tmp_path, kind):
    raw = models.llama(hidden_size=64, intermediate_size=96, num_key_value_heads=2)
    values = gguf_files.write(tmp_path / "m.gguf", raw, stored=Type[kind])
    weights = open_weights(tmp_path / "m.gguf")
    for tensor in weights.tensors:
        found = np.asarray(weights.read(tensor)).astype(np.float32)
        np.testing.assert_array_equal(found, tensor.from_hf(values[tensor.name]), tensor.name)
    matrix = next(tensor for tensor in weights.tensors if "gate_proj" in tensor.name)
    as_stored = {"BF16": "bfloat16", "F16": "float16"}
    assert weights.dtype(matrix) == as_stored.get(kind, "float32")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_on_load_as_the_dequantised_weights_would_be(tmp_path, weights):
    raw = models.llama(hidden_size=64, intermediate_size=96)
    values = gguf_files.write(tmp_path / "m.gguf", raw, stored=Type.Q4_0)
    folder = models.write_hf(tmp_path / "hf", raw)
    save_values(folder, values)
    heads = np.ones((2, 2), bool)
    ours = pretrained.load_split_params(tmp_path / "m.gguf", heads, weights=weights)
    theirs = pretrained.load_split_params(folder, heads, weights=weights)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def save_values(folder, values):
    from safetensors.numpy import save_file

    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_copy_of_the_embedding_is_an_output_of_its_own(tmp_path):
    tied = models.CASES["llama-3.2, tied embeddings"]
    gguf_files.write(tmp_path / "tied.gguf", tied)
    gguf_files.write(tmp_path / "not.gguf", tied | {"tie_word_embeddings": False})
    assert "lm_head" not in pretrained.load_params(tmp_path / "tied.gguf")
    assert "lm_head" in pretrained.load_params(tmp_path / "not.gguf")


def test_is_gguf_by_name_or_by_content(tmp_path):
    gguf_files.write(tmp_path / "model", LLAMA)
    (tmp_path / "x.GGUF").write_text("x")
    (tmp_path / "y.bin").write_text("x")
    (tmp_path / "folder.gguf").mkdir()
    found = {path.name for path in tmp_path.iterdir() if is_gguf(path)}
    assert found == {"model", "x.GGUF"}
    assert pretrained.resolve(str(tmp_path / "model")) == tmp_path / "model"
    with pytest.raises(InputError, match=r"holds GGUF files: name one, such as .*folder\.gguf"):
        pretrained.resolve(tmp_path)


# What is refused, by name and in one line.


def refused(path) -> str:
    with pytest.raises(InputError) as error:
        open_weights(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.add_expert_count(8), "mixture of experts"),
        (lambda w: w.add_sliding_window(16), "sliding-window attention"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts of a model"),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "rope scaling 'longrope' is not supported",
        ),
        (
            lambda w: w.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)),
            "'longrope' (rope_factors_long.weight)",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 3, 2, 5], np.float32)),
            "other factors than Llama 3's scaling gives",
        ),
        (
            lambda w: w.add_tensor("blk.0.extra.weight", np.ones(4, np.float32)),
            "1 unknown: blk.0.extra.weight",
        ),
        (
            lambda w: w.add_tensor("blk.0.extra.weight", np.ones(4, np.int32)),
            "has type I32, which the gguf package cannot turn into numbers",
        ),
        (lambda w: w.add_rope_scaling_attn_factors(2.0), "attn_factor 2.0 is not supported"),
        (lambda w: w.add_value_length(64), "value_length is 64"),
    ],
)
def test_what_a_file_may_not_have(tmp_path, change, said):
    gguf_files.write(tmp_path / "m.gguf", LLAMA, change=change)
    assert said in refused(tmp_path / "m.gguf")


def test_another_architecture_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    assert "architecture 'gemma3' is not supported" in refused(tmp_path / "m.gguf")


def damaged(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda _: b"", "does not begin with 'GGUF'"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (lambda c: c[:200], "it ends within its header"),
        (lambda c: c[:-100], "was the download complete?"),
        (lambda c: damaged(c, 4, struct.pack("<I", 1)), "it is of version 1"),
        (lambda c: damaged(c, 4, struct.pack(">I", 3)), "it is big-endian"),
        (
            lambda c: damaged(c, 8, struct.pack("<Q", 1 << 40)),
            "it counts 1,099,511,627,776 tensors",
        ),
        (lambda c: damaged(c, 16, struct.pack("<Q", 1 << 40)), "1,099,511,627,776 entries"),
        (lambda c: damaged(c, 24, struct.pack("<Q", 1 << 62)), "'a name' has 4,611"),
        (lambda c: c.replace(b"llama.block_count", b"general.alignment"), "in its metadata twice"),
        (lambda c: c.replace(b"llama.block_count", b"llama.other_count"), "it lacks llama.block"),
        (lambda c: c.replace(b"blk.0.attn_norm", b"blk.1.attn_norm"), "is there twice"),
        (lambda c: c.replace(b"blk.0.attn_norm", b"blk.9.attn_norm"), "1 missing: model.layers.0"),
        (lambda c: c.replace(b"general.alignment", b"\xff" * 17), "is not UTF-8"),
        (
            lambda c: c.replace(b"alignment\4\0\0\0@", b"alignment\4\0\0\0A"),
            "its alignment 65 is no",
        ),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, damage, said):
    gguf_files.write(tmp_path / "m.gguf", LLAMA, change=lambda w: w.add_custom_alignment(64))
    content = damage((tmp_path / "m.gguf").read_bytes())
    (tmp_path / "m.gguf").write_bytes(content)
    assert said in refused(tmp_path / "m.gguf")


def test_tensors_that_share_bytes_are_refused(tmp_path):
    gguf_files.write(tmp_path / "m.gguf", LLAMA)
    content = (tmp_path / "m.gguf").read_bytes()
    name = b"blk.1.attn_norm.weight"
    at = content.index(name) + len(name) + 4 + 8 + 4  # number of axes, the axis, the type
    (tmp_path / "m.gguf").write_bytes(damaged(content, at, bytes(8)))
    assert "shares bytes with" in refused(tmp_path / "m.gguf")


def test_a_header_is_read_once_until_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    gguf_files.write(file, LLAMA)
    just_written = read_header(file)
    assert read_header(file) is not just_written  # it may change within a tick of the clock
    monkeypatch.setattr(header, "_SETTLED", -math.inf)
    settled = read_header(file)
    assert read_header(file) is settled
    gguf_files.write(file, LLAMA | {"num_hidden_layers": LLAMA["num_hidden_layers"] + 1})
    assert len(read_header(file).tensors) > len(settled.tensors)


def test_without_the_package_one_line_names_it(tmp_path, monkeypatch):
    gguf_files.write(tmp_path / "m.gguf", LLAMA)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"needs the gguf package: pip install 'duo_jax\[gguf\]'"):
        read_header(tmp_path / "m.gguf")


def test_every_leaf_is_there(tmp_path):
    gguf_files.write(tmp_path / "m.gguf", LLAMA)
    folder = models.write_hf(tmp_path / "hf", LLAMA)
    ours, theirs = map(pretrained.load_params, (tmp_path / "m.gguf", folder))
    assert flattened(ours).keys() == flattened(theirs).keys()

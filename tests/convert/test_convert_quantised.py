"""Quantised checkpoints: what is written, who may read it, and that there is no way back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main
from duo_jax.checkpoints import orbax_checkpoint as checkpoint
from duo_jax.checkpoints import pretrained
from duo_jax.checkpoints.weights import open_weights
from duo_jax.errors import InputError
from duo_jax.model.quantised_weights import QuantisedKernel, dequantise
from tests import models

HEADS = np.ones((2, 2), bool)


def error_of(command, *words, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        command([str(word) for word in words])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    models.write_hf(root / "hf", models.qwen3(hidden_size=48), dtype="bfloat16")
    models.write_tokenizer(root / "hf")
    for weights in ("model", "int8", "int4"):
        main([str(root / "hf"), str(root / weights), "--weights", weights])
    return root


@pytest.mark.slow
def test_formats_of_what_is_stored(folders):
    original = open_weights(folders / "hf")
    for name in ("int8", "int4"):
        weights = open_weights(folders / name)
        assert weights.format == name
        assert weights.tensors == original.tensors
        for tensor in weights.tensors:
            stored, own = weights.read(tensor), original.read(tensor)
            if not isinstance(stored, QuantisedKernel):
                assert "_proj/kernel" not in "/".join(tensor.path)
                np.testing.assert_array_equal(stored, own)
                continue
            assert weights.dtype(tensor).name == stored.values.dtype.name == name
            assert stored.scales.dtype == np.float32
            error = dequantise(jax.tree.map(jnp.asarray, stored)) - np.asarray(own, np.float32)
            assert 0 < np.abs(error).max() <= stored.scales.max() * 0.5001
    assert open_weights(folders / "model").format == original.format == "model"


@pytest.mark.slow
def test_quantised_checkpoints_are_smaller(folders):
    def size(name):
        weights = open_weights(folders / name)
        arrays = [weights.read(tensor) for tensor in weights.tensors]
        kernels = [array for array in arrays if isinstance(array, QuantisedKernel)]
        return sum(kernel.values.size for kernel in kernels), len(kernels)

    assert size("int8") == size("int4")
    assert size("int8")[1] == 14
    assert size("model") == (0, 0)
    on_disk = {
        name: sum(file.stat().st_size for file in (folders / name).rglob("*") if file.is_file())
        for name in ("model", "int8", "int4")
    }
    assert on_disk["int4"] < on_disk["int8"] < on_disk["model"]


@pytest.mark.slow
def test_dtype_is_that_of_the_rest(folders, tmp_path):
    main([str(folders / "hf"), str(tmp_path / "out"), "--weights", "int8", "--dtype", "float32"])
    got = pretrained.load_split_params(tmp_path / "out", HEADS, weights="int8")
    want = pretrained.load_split_params(folders / "int8", HEADS, weights="int8")
    assert got["norm"]["scale"].dtype == jnp.float32
    assert want["norm"]["scale"].dtype == jnp.bfloat16
    a, b = (x["layers"][1]["mlp"]["up_proj"]["kernel"] for x in (got, want))
    np.testing.assert_array_equal(np.asarray(a.values), np.asarray(b.values))
    np.testing.assert_array_equal(a.scales, b.scales)


@pytest.mark.parametrize(
    ("stored", "asked", "named"),
    [
        ("int8", "model", "int8 or w8a8, not model"),
        ("int8", "int4", "int8 or w8a8, not int4"),
        ("int4", "w8a8", "int4, not w8a8"),
        ("int4", "model", "int4, not model"),
    ],
)
def test_another_format_is_refused_in_one_line(folders, stored, asked, named):
    with pytest.raises(InputError, match=f"holds {stored} weights: load it with weights {named}"):
        pretrained.load_split_params(folders / stored, HEADS, weights=asked)


def test_training_wants_the_originals(folders):
    with pytest.raises(InputError, match="int4 weights, which can be served but not trained with"):
        pretrained.load_params(folders / "int4")


def test_the_command_line_refuses_in_one_line(folders, tmp_path, capsys):
    target = tmp_path / "out"
    again = error_of(main, folders / "int8", target, capsys=capsys)
    assert "holds int8 weights, which cannot be converted again" in again
    back = error_of(main, "--to-hf", folders / "int4", target, capsys=capsys)
    assert "holds int4 weights, which cannot be converted again" in back
    both = error_of(main, "--to-hf", "--weights", "int8", folders / "hf", target, capsys=capsys)
    assert "--weights int8 is for checkpoints of duo_jax; leave out --to-hf" in both
    assert "'w8a8'" in error_of(main, folders / "hf", target, "--weights", "w8a8", capsys=capsys)
    assert not target.exists()


def test_generate_refuses_in_one_line(folders, capsys):
    from duo_jax.generate import main as generate

    words = ("--model", folders / "int8", "--pattern", "none", "--prompt", "x")
    assert "load it with weights int8 or w8a8" in error_of(generate, *words, capsys=capsys)
    assert "'int3'" in error_of(generate, "--weights", "int3", capsys=capsys)


def test_what_cannot_be_quantised_leaves_nothing_behind(tmp_path, capsys):
    models.write_hf(tmp_path / "hf", models.llama(intermediate_size=262))
    line = error_of(main, tmp_path / "hf", tmp_path / "out", "--weights", "int4", capsys=capsys)
    assert "262 inputs cannot be divided; use int8" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ({"version": 1}, "do not fit its config.json; 14 missing"),
        ({"version": 2, "weights": "int4"}, "do not fit its config.json"),
        ({"version": 2, "weights": "int2"}, "version 2, weights 'int2'; this duo_jax reads"),
        ({"version": 2}, "version 2; this duo_jax reads"),
        ({"version": 3, "weights": "int8"}, "version 3, weights 'int8'; this duo_jax reads"),
    ],
)
def test_a_marker_that_does_not_fit_is_refused(folders, marker, message):
    path = folders / "int8" / "duo_jax.json"
    before = path.read_text()
    path.write_text(json.dumps({"format": "duo_jax checkpoint"} | marker))
    try:
        with pytest.raises(InputError, match=message) as error:
            open_weights(folders / "int8")
    finally:
        path.write_text(before)
    assert "\n" not in str(error.value)
    assert open_weights(folders / "int8").format == "int8"


def test_unquantised_checkpoints_are_what_they_were(folders):
    """Readers from before formats existed read them; quantised ones they refuse by version."""
    marker = json.loads((folders / "model" / "duo_jax.json").read_text())
    assert {name: marker[name] for name in marker if name not in ("digests", "checksum")} == {
        "format": "duo_jax checkpoint",
        "version": 1,
    }
    assert checkpoint.marker_of("int8")["version"] != 1

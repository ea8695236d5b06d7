"""Which pattern a model has for which nobody named one."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import duo_jax
from convert.__main__ import main as convert
from duo_jax.checkpoints import own_pattern
from duo_jax.checkpoints.weights import open_weights
from duo_jax.cli import presets
from duo_jax.cli.model_flags import ModelFlags
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, load_pattern, save_pattern
from duo_jax.model.hf_config import read_config
from tests import models

RAW = models.llama(vocab_size=400, num_key_value_heads=4)
pytestmark = pytest.mark.usefixtures("shipped")
GATES = np.array([[0.9, 0.2, 0.4, 0.1], [0.3, 0.8, 0.7, 0.6]])


@pytest.fixture
def folder(tmp_path):
    """Write a model whose norms are no ones, as a trained one's."""
    folder = models.write_hf(tmp_path / "any name", RAW)
    models.write_tokenizer(folder, vocab_size=400)
    file = folder / "model.safetensors"
    rng = np.random.default_rng(0)
    save_file(
        {
            name: (1 + rng.normal(size=x.shape)).astype(ml_dtypes.bfloat16).astype(x.dtype)
            if x.ndim == 1
            else x
            for name, x in load_file(file).items()
        },
        file,
    )
    return folder


@pytest.fixture
def shipped(folder, tmp_path, monkeypatch):
    """Let a pattern for that model ship."""
    pattern = tmp_path / "patterns" / "known"
    weight_files = open_weights(folder)
    extra = {
        own_pattern.FINGERPRINT: own_pattern.fingerprint(weight_files),
        own_pattern.SKETCH: own_pattern.sketch(weight_files),
    }
    save_pattern(Pattern(gates=GATES, sink_size=4, recent_size=8, extra=extra), pattern)
    monkeypatch.setattr(own_pattern, "shipped_patterns", lambda: [pattern])
    return pattern


def change(folder, name: str, index: int) -> None:
    """Add a little to one number of a tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].reshape(-1)[index] *= 1.01
    save_file(tensors, folder / "model.safetensors")


def test_a_model_is_known_by_its_weights(folder):
    model = duo_jax.load(folder)
    assert model.config.retrieval_counts == (1, 3)
    assert (model.config.sink_size, model.config.recent_size) == (4, 8)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("words", [[], ["--weights", "int4"], ["--dtype", "float16"]])
def test_in_every_format(folder, shipped, tmp_path, words):
    convert([*words, str(folder), str(tmp_path / "converted")])
    converted = tmp_path / "converted"
    assert own_pattern.find_pattern(converted, read_config(converted)) == shipped


def test_other_weights_are_another_model(folder):
    change(folder, "model.layers.1.input_layernorm.weight", 7)
    with pytest.raises(InputError, match="has no pattern of its own"):
        duo_jax.load(folder)


@pytest.mark.parametrize("module", ["q_proj", "v_proj"])
def test_other_projections_are_another_model(folder, module):
    """Norms are often frozen, or all ones."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: -x if module in name else x for name, x in tensors.items()}, file)
    with pytest.raises(InputError, match="has no pattern of its own"):
        duo_jax.load(folder)


def test_another_rope_is_another_model(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"]["rope_theta"] *= 2
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="has no pattern of its own"):
        duo_jax.load(folder)


def test_a_command_says_so(folder, shipped, capsys):
    ModelFlags(model=str(folder)).load()
    assert capsys.readouterr().err == "[heads: the pattern of known that ships]\n"
    ModelFlags(model=str(folder), pattern=str(shipped)).load()
    assert capsys.readouterr().err == ""


def test_a_name_says_nothing(tmp_path):
    other = models.write_hf(tmp_path / "known", RAW)
    with pytest.raises(InputError, match="has no pattern of its own"):
        duo_jax.load(other)


def test_the_model_s_own_pattern_comes_first(folder):
    save_pattern(Pattern(gates=1 - GATES, sink_size=2, recent_size=6), folder / own_pattern.OWN)
    assert duo_jax.load(folder).config.retrieval_counts == (3, 1)


def test_a_folder_without_weights_is_not_known(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no pattern of its own"):
        own_pattern.find_pattern(folder, read_config(folder))


def test_presets_lie_beside_a_pattern_that_ships(folder, shipped):
    """A preset of the model's own comes first; one that ships is no other model's."""
    assert presets.file_of(folder, "identify.json") == shipped / "identify.json"
    (folder / "identify.json").write_text("{}")
    assert presets.file_of(folder, "identify.json") == folder / "identify.json"
    change(folder, "model.layers.1.input_layernorm.weight", 7)
    assert presets.file_of(folder, "evaluate.json") == folder / "evaluate.json"


@pytest.mark.parametrize(
    "pattern", patterns := own_pattern.shipped_patterns(), ids=[p.name for p in patterns]
)
def test_patterns_that_ship_say_where_they_come_from(pattern):
    loaded = load_pattern(pattern)
    known_by = {own_pattern.FINGERPRINT, own_pattern.SKETCH}
    assert set(loaded.extra) >= known_by | {"model_name", "method", "num_steps"}
    assert (pattern / "identify.json").exists()
    assert (pattern / "README.md").exists()

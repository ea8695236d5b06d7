"""Pattern files and the choice of retrieval heads, against the published patterns and SPEC."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from duo_jax.errors import InputError
from duo_jax.heads.pattern import (
    Pattern,
    check_fits,
    choose_retrieval_heads,
    load_pattern,
    save_pattern,
)
from tests.disk import full_disk

PUBLISHED = pathlib.Path(__file__).parents[4] / "shared" / "attn_patterns"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"the published patterns are not in {PUBLISHED}"
)
# SPEC section 6: layers, KV heads, mean (3 digits), percent of gates above 0.5 (1 digit).
FIGURES = {
    "Llama-2-7B-32K-Instruct": (32, 32, 0.419, 43.4),
    "Llama-3-8B-Instruct-Gradient-1048k": (32, 8, 0.769, 80.9),
    "Llama-3-8B-Instruct-Gradient-4194k": (32, 8, 0.775, 81.3),
    "Meta-Llama-3.1-8B-Instruct": (32, 8, 0.852, 91.4),
    "Mistral-7B-Instruct-v0.2": (32, 8, 0.923, 95.3),
    "Mistral-7B-Instruct-v0.3": (32, 8, 0.905, 93.8),
}
# SPEC section 6: sparsity, retrieval heads of each layer.
COUNTS = {
    "Llama-2-7B-32K-Instruct": (
        0.75,
        "2 10 2 5 3 4 9 8 9 5 8 10 4 6 12 9 12 10 9 6 11 8 14 5 12 8 12 3 6 6 12 16",
    ),
    "Llama-3-8B-Instruct-Gradient-1048k": (
        0.5,
        "1 1 3 2 2 4 2 4 6 4 5 3 2 6 5 5 5 6 3 5 6 3 3 6 4 4 3 4 6 5 8 2",
    ),
    "Llama-3-8B-Instruct-Gradient-4194k": (
        0.5,
        "2 1 3 0 2 5 2 4 5 3 4 4 1 6 5 5 5 6 3 3 6 4 5 5 5 5 5 6 5 5 8 0",
    ),
    "Meta-Llama-3.1-8B-Instruct": (
        0.5,
        "2 3 4 1 4 2 2 6 4 6 5 5 2 8 4 5 4 6 3 4 5 2 4 5 3 3 3 4 5 5 8 1",
    ),
}


def published(name: str) -> pathlib.Path:
    (folder,) = (PUBLISHED / name).iterdir()
    return folder


@needs_published
@pytest.mark.parametrize("name", FIGURES)
def test_published_pattern_loads_with_the_figures_of_the_spec(name):
    layers, kv_heads, mean, above_half = FIGURES[name]
    pattern = load_pattern(published(name))
    assert pattern.gates.shape == (layers, kv_heads)
    assert (pattern.sink_size, pattern.recent_size) == (128, 256)
    assert pattern.extra["lr"] == 0.02
    assert abs(pattern.clipped().mean() - mean) < 0.00051
    assert abs(100 * (pattern.clipped() > 0.5).mean() - above_half) < 0.051


@needs_published
@pytest.mark.parametrize("name", FIGURES)
def test_published_pattern_saves_back_unchanged(tmp_path, name):
    original, copy = published(name), tmp_path / "copy"
    save_pattern(load_pattern(original), copy)
    tsv = "full_attention_heads.tsv"
    assert (copy / tsv).read_bytes() == (original / tsv).read_bytes()
    assert json.loads((copy / "config.json").read_text()) == json.loads(
        (original / "config.json").read_text()
    )
    np.testing.assert_array_equal(load_pattern(copy).gates, load_pattern(original).gates)


@needs_published
@pytest.mark.parametrize("name", COUNTS)
def test_retrieval_heads_per_layer_are_those_of_the_spec(name):
    sparsity, counts = COUNTS[name]
    chosen = choose_retrieval_heads(load_pattern(published(name)).gates, sparsity=sparsity)
    assert chosen.sum(axis=1).tolist() == [int(x) for x in counts.split()]


def test_ties_go_to_the_earlier_layer_then_the_earlier_head():
    gates = np.array([[0.2, 0.9, 0.5], [0.5, 0.5, 0.9]])
    ranking = [(0, 1), (1, 2), (0, 2), (1, 0), (1, 1), (0, 0)]
    for kept in range(7):
        chosen = choose_retrieval_heads(gates, sparsity=1 - kept / 6)
        assert set(zip(*np.nonzero(chosen), strict=True)) == set(ranking[:kept])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (32, 8), (32, 32)])
def test_exactly_the_rounded_number_of_heads_is_kept(shape):
    tied = np.round(np.random.default_rng(0).uniform(0, 1, shape), 1)
    for sparsity in (0, 0.125, 0.25, 1 / 3, 0.5, 0.6, 0.75, 0.999, 1, *np.linspace(0, 1, 37)):
        for gates in (tied, np.ones(shape), np.zeros(shape)):
            chosen = choose_retrieval_heads(gates, sparsity=float(sparsity))
            assert chosen.shape == shape
            assert chosen.sum() == round(gates.size * (1 - sparsity))


def test_higher_sparsity_keeps_a_subset():
    gates = np.random.default_rng(1).uniform(0, 1, (4, 4))
    kept = [choose_retrieval_heads(gates, sparsity=s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert kept[0].all()
    assert not kept[-1].any()
    for wider, narrower in itertools.pairwise(kept):
        assert not (narrower & ~wider).any()


def test_values_outside_0_and_1_count_as_0_and_1():
    gates = np.array([[1.0, 1.3], [-0.2, 0.0]])
    chosen = choose_retrieval_heads(gates, sparsity=0.75)
    np.testing.assert_array_equal(chosen, [[True, False], [False, False]])  # a tie at 1
    chosen = choose_retrieval_heads(gates, sparsity=0.25)
    np.testing.assert_array_equal(chosen, [[True, True], [True, False]])  # a tie at 0
    pattern = Pattern(gates=gates, sink_size=1, recent_size=2)
    np.testing.assert_array_equal(pattern.clipped(), [[1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(pattern.gates, [[1.0, 1.3], [-0.2, 0.0]])


@pytest.mark.parametrize("sparsity", [-0.1, 1.01, float("nan")])
def test_sparsity_outside_0_and_1_is_refused(sparsity):
    with pytest.raises(InputError, match=r"is not a number from 0 to 1"):
        choose_retrieval_heads(np.ones((2, 2)), sparsity=sparsity)


def write(folder: pathlib.Path, *, gates="0.5\t1\n0\t0.25\n", config=None) -> pathlib.Path:
    folder.mkdir()
    sizes = '{"sink_size": 4, "recent_size": 8}'
    for name, contents in (
        ("full_attention_heads.tsv", gates),
        ("config.json", config or sizes),
    ):
        data = contents if isinstance(contents, bytes) else contents.encode()
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "gates",
    ["0.5\t1\n0\t0.25", "0.5\t1\r\n0\t0.25\r\n", "5e-1\t1.0\n\n0\t.25\n\n"],
    ids=["no newline at the end", "Windows line ends", "blank lines"],
)
def test_harmless_differences_of_the_file_load(tmp_path, gates):
    pattern = load_pattern(write(tmp_path / "pattern", gates=gates))
    np.testing.assert_array_equal(pattern.gates, [[0.5, 1.0], [0.0, 0.25]])
    assert (pattern.sink_size, pattern.recent_size, dict(pattern.extra)) == (4, 8, {})


MALFORMED = {
    "ragged rows": ({"gates": "1\t0\n1\n"}, "row 2 has 1 values, row 1 has 2"),
    "text": ({"gates": "1\t0\n1\thigh\n"}, "'high'"),
    "nan": ({"gates": "1\tnan\n"}, "finite"),
    "infinity": ({"gates": "1\tinf\n"}, "finite"),
    "spaces for tabs": ({"gates": "1 0\n0 1\n"}, "tab-separated"),
    "no rows": ({"gates": "\n"}, "holds no numbers"),
    "gates not UTF-8": ({"gates": b"\xff\xfe1"}, "not UTF-8"),
    "no sink_size": ({"config": '{"recent_size": 8}'}, "lacks sink_size"),
    "no sizes": ({"config": "{}"}, "lacks sink_size, recent_size"),
    "size is null": ({"config": '{"sink_size": null, "recent_size": 8}'}, "sink_size is None"),
    "size is text": ({"config": '{"sink_size": "4", "recent_size": 8}'}, "sink_size is '4'"),
    "negative sink_size": ({"config": '{"sink_size": -1, "recent_size": 8}'}, "sink_size is -1"),
    "recent_size 0": ({"config": '{"sink_size": 4, "recent_size": 0}'}, "recent_size is 0"),
    "config not JSON": ({"config": "sink_size: 4"}, "config.json is not JSON"),
    "config a list": ({"config": '[["sink_size", 4], ["recent_size", 8]]'}, "JSON object"),
    "config not UTF-8": ({"config": b"\xff"}, "config.json is not"),
}


@pytest.mark.parametrize(("files", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_folders_are_one_clear_line(tmp_path, files, message):
    folder = write(tmp_path / "pattern", **files)
    with pytest.raises(InputError) as error:
        load_pattern(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["full_attention_heads.tsv", "config.json"])
def test_a_missing_file_is_named_with_what_belongs_there(tmp_path, missing):
    folder = write(tmp_path / "pattern")
    (folder / missing).unlink()
    with pytest.raises(InputError, match=rf"{missing} does not exist; a pattern folder holds"):
        load_pattern(folder)


def test_check_fits_gives_both_shapes_and_the_likely_cause():
    pattern = Pattern(gates=np.ones((32, 8)), sink_size=128, recent_size=256)
    check_fits(pattern, num_layers=32, num_kv_heads=8)
    message = "pattern has 32 layers x 8 KV heads, the model has 28 x 4; was it learned on another"
    with pytest.raises(InputError, match=message):
        check_fits(pattern, num_layers=28, num_kv_heads=4)


def test_saving_keeps_values_exactly_and_other_keys(tmp_path):
    gates = np.random.default_rng(2).standard_normal((3, 2))
    extra = {"lr": 0.02, "note": "ünlike", "nested": {"a": [1, None]}}
    save_pattern(
        Pattern(gates=gates, sink_size=0, recent_size=1, extra=extra), tmp_path / "a" / "pattern"
    )
    loaded = load_pattern(tmp_path / "a" / "pattern")
    assert loaded.gates.tobytes() == gates.tobytes()
    assert (loaded.sink_size, loaded.recent_size, loaded.extra) == (0, 1, extra)


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    """Such as the model's own."""
    folder = write(tmp_path / "model")
    (folder / "model.safetensors").write_text("weights")
    with pytest.raises(InputError, match="holds other files than a pattern's"):
        save_pattern(Pattern(gates=np.ones((1, 1)), sink_size=2, recent_size=3), folder)
    assert load_pattern(folder).gates.shape == (2, 2)
    assert (folder / "model.safetensors").read_text() == "weights"


def test_saving_replaces_a_pattern(tmp_path):
    folder = write(tmp_path / "pattern")
    save_pattern(Pattern(gates=np.ones((1, 1)), sink_size=2, recent_size=3), folder)
    assert load_pattern(folder).gates.shape == (1, 1)
    names = {file.name for file in folder.iterdir()}
    assert names == {"full_attention_heads.tsv", "config.json"}
    assert [file.name for file in tmp_path.iterdir()] == ["pattern"]


def test_a_failed_save_leaves_the_old_pattern(tmp_path):
    folder = write(tmp_path / "pattern")
    pattern = Pattern(gates=np.ones((1, 1)), sink_size=2, recent_size=3)
    with full_disk(10), pytest.raises(InputError, match="pattern cannot be written"):
        save_pattern(pattern, folder)
    assert load_pattern(folder).gates.shape == (2, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["pattern"]


GATES = np.ones((2, 2))
NOT_EXTRA = {
    "an object": {"a": object()},
    "a number of numpy": {"a": np.float32(1)},
    "nan": {"a": [float("nan")]},
    "a name that is no text": {1: 2},
    "the pattern's own size": {"sink_size": 5},
    "too deep": {"a": json.loads("[" * 70 + "]" * 70)},
    "too many digits": {"a": 10**200},
    "no mapping": [("a", 1)],
}


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("case", NOT_EXTRA)
def test_what_could_not_be_read_again_is_refused_at_once(case):
    with pytest.raises(InputError, match=r"^extra "):
        Pattern(gates=GATES, sink_size=1, recent_size=2, extra=NOT_EXTRA[case])


def test_what_was_changed_since_is_refused_by_saving(tmp_path):
    pattern = Pattern(gates=GATES.copy(), sink_size=1, recent_size=2, extra={})
    pattern.extra["a"] = object()
    with pytest.raises(InputError, match="cannot be written as JSON"):
        save_pattern(pattern, tmp_path / "pattern")
    del pattern.extra["a"]
    pattern.gates[0, 0] = np.nan
    with pytest.raises(InputError, match="finite"):
        save_pattern(pattern, tmp_path / "pattern")
    assert not (tmp_path / "pattern").exists()


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    "gates", ["x", [[1.0]], np.ones((0, 2)), np.ones((2, 0)), np.ones((1000, 1000)), GATES * np.nan]
)
def test_gates_that_are_none_choose_nothing(gates):
    with pytest.raises(InputError, match=r"^gates .* no numpy array of 1 to 100,000 finite"):
        choose_retrieval_heads(gates, sparsity=0.5)
    with pytest.raises(InputError, match=r"^gates .* no numpy array of 1 to 100,000 finite"):
        Pattern(gates=gates, sink_size=1, recent_size=2)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, bool, np.int64, np.int8])
def test_the_most_gates_are_read_again(tmp_path, dtype):
    gates = (-np.ones((100, 1000))).astype(dtype)
    save_pattern(Pattern(gates=gates, sink_size=1, recent_size=2), tmp_path / "pattern")
    np.testing.assert_array_equal(load_pattern(tmp_path / "pattern").gates, gates.astype(float))


def test_a_table_of_more_gates_is_refused_with_its_name(tmp_path):
    folder = write(tmp_path / "pattern")
    (folder / "full_attention_heads.tsv").write_text("1\t1\n" * 60_000)
    with pytest.raises(InputError, match=r"heads\.tsv holds 120,000 gates, more than 100,000"):
        load_pattern(folder)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("pattern", "folder", "message"),
    [
        ("x", "p", "pattern 'x' is no Pattern"),
        (None, "p", "pattern None is no Pattern"),
        (Pattern(gates=GATES, sink_size=1, recent_size=2), 5, "folder 5 is neither a text nor"),
        (Pattern(gates=GATES, sink_size=1, recent_size=2), "", "an output folder needs a name"),
    ],
)
def test_what_cannot_be_saved(pattern, folder, message):
    with pytest.raises(InputError, match=message):
        save_pattern(pattern, folder)

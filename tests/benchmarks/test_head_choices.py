"""The comparison of choices of heads: every row has its own heads, and a stopped run goes on."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import head_choices
from benchmarks.head_choices import HeadChoicesFlags
from benchmarks.quality import head_choices_report as report
from benchmarks.quality.head_choices_flags import Templates, default
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, choose_retrieval_heads, random_heads, save_pattern
from tests import models
from train.retrieval_test import RetrievalScores, RetrievalTest

GATES = {
    "learned": np.array([[0.9, 0.1, 0.2, 0.8]]),
    "profile": np.array([[0.1, 0.9, 0.2, 0.8]]),
}
DATA = Templates(
    words="digits",
    intro="",
    needle=" {name}{passkey}.",
    closing="",
    question=" {name}",
    separator=".",
)
SMALL = {
    "lengths": (256, 128),
    "num_passkeys": (2, 1),
    "tokens": 256,
    "random_seeds": 2,
    "data": DATA,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    raw = models.llama(
        vocab_size=600, max_position_embeddings=512, num_hidden_layers=1, num_key_value_heads=4
    )
    folder = models.write_hf(tmp_path_factory.mktemp("models") / "tiny", raw)
    return models.write_tokenizer(folder)


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patterns")
    for name, gates in GATES.items():
        save_pattern(Pattern(gates=gates, sink_size=4, recent_size=12), folder / name)
    return tuple(f"{name}={folder / name}" for name in GATES)


@pytest.fixture
def measured(monkeypatch):
    """Stand in for retrieval, which a random model has none of; return what was measured.

    Each text and each choice of heads has another score.
    """
    seen = []

    def scores(self, architecture, params, heads, *, sink_size, recent_size, reference=None):
        del architecture, params
        assert (sink_size, recent_size) == (4, 12)
        assert (reference is None) == heads.all()
        shape = (len(self.samples), len(self.samples[0].answers))
        seen.append((self.length, shape, tuple(heads.ravel().tolist())))
        first = np.array([sample.tokens[5:50].sum() for sample in self.samples])[:, None]
        values = np.full(shape, value_of(heads)) + first % 7 / 100
        return RetrievalScores(
            exact=values,
            tokens=values,
            nll=1 - values,
            kl=None if heads.all() else values,
            tails=[],
        )

    monkeypatch.setattr(RetrievalTest, "scores", scores)
    return seen


@pytest.fixture
def undrawn(monkeypatch):
    """Draw nothing: pictures take most of the time."""
    monkeypatch.setattr(report, "plot", lambda *_: None)


def value_of(heads: np.ndarray) -> float:
    return float((heads.ravel() * [0.1, 0.2, 0.25, 0.3]).sum())


def run(tmp_path, model, patterns, **changes):
    flags = SMALL | {"workdir": str(tmp_path / "work"), "out": tmp_path / "some/result.json"}
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {number}th of many words" for number in range(1500)))
    flags |= {"model": str(model), "patterns": patterns, "text": (str(text),)} | changes
    head_choices.main(HeadChoicesFlags(**flags))
    return json.loads(flags["out"].read_text())


@pytest.mark.usefixtures("undrawn")
def test_each_choice_is_measured_with_its_heads_short_lengths_first(
    tmp_path, model, patterns, measured
):
    result = run(tmp_path, model, patterns)
    assert list(dict.fromkeys(cell[:2] for cell in measured)) == [
        (128, (2, 1)), (128, (2, 2)), (256, (1, 1)), (256, (1, 2)),
    ]  # fmt: skip
    first = [np.array(heads).reshape(1, 4) for length, _, heads in measured if length == 128]
    assert first[0].all()
    assert len({heads.tobytes() for heads in first}) == len(first) // 2  # of two numbers of keys
    for row in result["rows"]:
        if row["heads"] in GATES:
            heads = choose_retrieval_heads(GATES[row["heads"]], sparsity=row["sparsity"])
        elif row["heads"] == "random":
            as_many = choose_retrieval_heads(np.ones((1, 4)), sparsity=row["sparsity"])
            heads = random_heads(as_many, seed=row["seed"])
        else:
            heads = np.full((1, 4), row["heads"] == "full attention")
        assert row["retrieval_heads"] == heads.sum()
        assert np.mean(row["exact"]) == pytest.approx(value_of(heads), abs=0.07)
        assert len(row["nll"]) == 256 // row["length"]
    lines = [(row["heads"], row["sparsity"]) for row in result["rows"][:10]]
    assert lines[:2] == [("full attention", 0.0), ("all streaming", 1.0)]
    assert lines[2:6] == [("learned", 0.5), ("profile", 0.5), ("random", 0.5), ("random", 0.5)]


@pytest.mark.usefixtures("undrawn")
def test_a_killed_run_measures_the_rest_only(tmp_path, model, patterns, measured, monkeypatch):
    add, left = head_choices.Rows.add, iter([True] * 3)

    def killed(self, key, row):
        next(left)
        add(self, key, row)

    monkeypatch.setattr(head_choices.Rows, "add", killed)
    with pytest.raises(StopIteration):
        run(tmp_path, model, patterns)
    monkeypatch.setattr(head_choices.Rows, "add", add)
    before = list(measured)
    assert len(before) == 4  # the last was lost
    measured.clear()
    again = run(tmp_path, model, patterns)
    # Full attention once more, for others to be compared with; nothing else.
    assert measured[0] == before[0]
    assert not set(measured[1:]) & set(before[:3])
    measured.clear()
    assert run(tmp_path, model, patterns)["rows"] == again["rows"]
    assert not measured
    assert again == run(tmp_path, model, patterns) | {"load_before": again["load_before"]}
    more = run(tmp_path, model, patterns[:1], lengths=(128,), num_passkeys=(1,), random_seeds=3)
    assert {row["seed"] for row in more["rows"]} == {0, 1, 2}
    with pytest.raises(InputError, match="tokens was 256, is 512"):
        run(tmp_path, model, patterns, tokens=512)


@pytest.mark.usefixtures("measured", "undrawn")
def test_differences_are_paired_and_their_errors_over_texts(tmp_path, model, patterns):
    result = run(tmp_path, model, patterns)
    found = report.lines(result, 1, 128)
    by_place = {(line.heads, line.sparsity): line for line in found}
    assert [line.sparsity for line in found] == sorted(line.sparsity for line in found)
    learned = by_place["learned", 0.75]
    change = report.difference(found, learned, "full attention", "exact")
    np.testing.assert_allclose(change, [0.1 - 0.85] * 2)
    change = report.difference(found, learned, "profile", "nll")
    np.testing.assert_allclose(change, [0.2 - 0.1] * 2)
    assert report.difference(found, by_place["all streaming", 1.0], "profile", "nll") is None
    assert report.difference(found, by_place["profile", 0.5], "profile", "nll") is None
    everywhere = report.lines(result, 1, None)
    assert everywhere[0].texts("exact").size == 3
    np.testing.assert_allclose(everywhere[0].texts("exact")[:2], found[0].texts("exact"))
    table = (tmp_path / "some/result.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| 128 | 2 | learned | 75%"))
    assert "| -75.0 ± 0.0 | +0.750 ± 0.000 | -10.0 ± 0.0 | +0.100 ± 0.000 |" in row
    row = next(line for line in table.splitlines() if line.startswith("| 256 | 1 | learned | 75%"))
    assert "| -75.0 | +0.750 | -10.0 | +0.100 |" in row  # a single text has no error
    assert table.count("### ") == 2
    seeds = by_place["random", 0.5].scores["exact"]
    low, high = sorted(seeds.mean(axis=1))
    assert f" ({100 * low:.1f} to {100 * high:.1f}) |" in table


@pytest.mark.usefixtures("measured", "undrawn")
def test_patterns_of_one_name_are_seeds_of_one_line(tmp_path, model, patterns):
    alone = run(tmp_path, model, patterns)
    one_name = tuple(f"both={pattern.partition('=')[2]}" for pattern in patterns)
    (line,) = (
        line
        for line in report.lines(run(tmp_path, model, one_name), 1, 128)
        if (line.heads, line.sparsity) == ("both", 0.75)
    )
    apart = [x for x in report.lines(alone, 1, 128) if x.heads in GATES and x.sparsity == 0.75]
    of_seeds = np.concatenate([x.scores["nll"] for x in apart])
    np.testing.assert_allclose(line.scores["nll"], of_seeds)
    np.testing.assert_allclose(line.texts("nll"), of_seeds.mean(axis=0))
    assert len(of_seeds) == 2
    assert (of_seeds[0] != of_seeds[1]).any()


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_picture_shows_a_panel_for_each_table_measure_and_sparsity(tmp_path, model, patterns):
    run(tmp_path, model, patterns, lengths=(128,), num_passkeys=(1,))
    with Image.open(tmp_path / "some/result.png") as image:
        small = image.size
    run(tmp_path, model, patterns, lengths=(128, 256), num_passkeys=(2,), sparsities=(0.5,))
    with Image.open(tmp_path / "some/result.png") as image:
        assert image.size[0] < 0.7 * small[0]  # one sparsity of two
        assert image.size[1] == small[1]
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.slow
def test_the_demo_model_keeps_its_passkeys_with_its_own_pattern(tmp_path):
    folder = pretrained.resolve("demo")
    flags = default("demo", folder)
    assert flags.data.words == "vocabulary"
    small = {"lengths": (256,), "num_passkeys": (2,), "tokens": 512, "random_seeds": 1}
    out = {"out": tmp_path / "result.json", "workdir": str(tmp_path / "work")}
    head_choices.main(HeadChoicesFlags(data=flags.data, sparsities=(0.5,), **small, **out))
    result = json.loads(out["out"].read_text())
    by_heads = {row["heads"]: row for row in result["rows"]}
    assert list(by_heads) == ["full attention", "all streaming", "learned", "random"]
    full, streaming, learned = itertools.islice(by_heads.values(), 3)
    assert np.mean(full["exact"]) == np.mean(learned["exact"]) == 1
    assert np.mean(streaming["exact"]) < 1
    assert full["kl"] is None
    assert 0 <= np.mean(learned["kl"]) < 0.1 < np.mean(streaming["kl"])
    assert result["settings"]["sink"] == 16
    assert full["haystack"] == "held-out text"


def test_texts_are_not_those_of_identification_or_its_report(model):
    tokenizer = pretrained.load_tokenizer(model)
    text = ["one two three four five six seven " * 200]
    shape = {"num_passkeys": 1, "min_length": 1, "max_length": 256}
    data = head_choices.PasskeyConfig(**dataclasses.asdict(DATA) | shape)
    drawn = [
        RetrievalTest(data, tokenizer, text, text, num_samples=1, seed=0, stream=stream).samples[0]
        for stream in (0, 1, 2, head_choices._STREAM)
    ]
    keys = {sample.tokens[slice(*sample.answers[0])].tobytes() for sample in drawn}
    assert len(keys) == 4


def test_models_without_a_preset_are_asked_for_digits(model):
    assert default(str(model), model).data.words == "digits"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"patterns": ("folder",)}, "not NAME=FOLDER"),
        ({"patterns": ("random=x",)}, "cannot be named"),
        ({"lengths": (64, 64)}, "twice"),
        ({"sparsities": ()}, "empty"),
        ({"tokens": 0}, "tokens"),
        ({"recent": 0}, "recent"),
    ],
    ids=str,
)
def test_unusable_settings_are_refused(changes, complaint):
    with pytest.raises(InputError, match=complaint):
        HeadChoicesFlags(**changes)


def test_what_does_not_fit_the_model_is_refused(tmp_path, model, patterns):
    with pytest.raises(InputError, match="beyond the model's range"):
        run(tmp_path, model, patterns, lengths=(1024,))
    with pytest.raises(InputError, match="no pattern of its own"):
        run(tmp_path, model, ())
    wide = Pattern(gates=np.ones((2, 4)), sink_size=4, recent_size=12)
    save_pattern(wide, tmp_path / "wide")
    with pytest.raises(InputError, match="2 layers"):
        run(tmp_path, model, (f"wide={tmp_path / 'wide'}",))

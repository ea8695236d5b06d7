"""The ablations: every row tests what it says, with heads that the identification command finds."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import ablations
from benchmarks.ablations import AblationsFlags
from benchmarks.quality import ablations_report
from duo_jax.errors import InputError
from duo_jax.heads.pattern import choose_retrieval_heads, load_pattern
from tests import models
from train.identify.flags import default_config
from train.identify.run import identify
from train.retrieval_test import RetrievalTest

pytestmark = pytest.mark.slow  # learns gates of every method, with several seeds
PRESET = {
    "sink": 4,
    "recent": 12,
    "num_steps": 4,
    "profile_samples": 2,
    "dtype": "float32",
    "length_buckets": 1,
    "eval_samples": 0,
    "data": {"num_passkeys": 3, "passkey_words": 4, "min_length": 200, "max_length": 256},
}
TINY = {
    "sparsities": (0.25, 0.75),
    "sinks": (0, 4),
    "recents": (3, 12, 20),
    "grid_sparsities": (0.5,),
    "seeds": 2,
    "random_seeds": 3,
    "samples": 2,
    "mask_steps": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    raw = models.llama(
        vocab_size=600, max_position_embeddings=512, num_hidden_layers=1, num_key_value_heads=4
    )
    folder = models.write_hf(tmp_path_factory.mktemp("models") / "tiny", raw)
    (folder / "identify.json").write_text(json.dumps(PRESET))
    return models.write_tokenizer(folder)


def of_seeds(gates: list, method: str, target: float | None) -> list[np.ndarray]:
    """Return the gates of a method's seeds."""
    wanted = (method, target)
    return [np.array(x["gates"]) for x in gates if (x["method"], x["target"]) == wanted]


def score(heads: np.ndarray, sink: int, recent: int) -> float:
    """Stand in for retrieval, which a random model has none of: another number for each case."""
    places = np.arange(1, heads.size + 1) ** 2
    return float((heads.ravel() * places).sum() + sink / 10 + recent / 1000) / 100


@pytest.fixture(scope="module")
def result(model, tmp_path_factory):
    def accuracy(self, config, _, heads, *, sink_size, recent_size):
        assert heads.shape == (config.num_layers, config.num_kv_heads)
        value = score(heads, sink_size, recent_size)
        return value + np.array([[0.01] * 3, [-0.01] * 3])[: len(self.samples)]

    out = tmp_path_factory.mktemp("results") / "some" / "ablations.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetrievalTest, "accuracy", accuracy)
        flags = AblationsFlags(model=str(model), out=out, workdir=out.parent / "work", **TINY)
        find_heads, done_before = ablations.find_heads, []
        patch.setattr(ablations, "find_heads", watched(3, find_heads, []))
        with pytest.raises(StopIteration):
            ablations.main(flags)
        patch.setattr(ablations, "find_heads", watched(10_000, find_heads, done_before))
        ablations.main(flags)
    return json.loads(out.read_text()), out, done_before


def watched(kill_at: int, find_heads, done_before: list):
    """Return the search for heads: it says what was done before, and ends the process at a call."""
    calls = iter(range(kill_at))

    def find(*args):
        next(calls)
        gates, seconds = find_heads(*args)
        done_before.append(seconds is None)
        return gates, seconds

    return find


def test_a_killed_run_goes_on_with_what_it_had_found(result):
    values, _, done_before = result
    assert len(values["gates"]) + 2 == len(done_before)  # two windows of (b)
    assert done_before == [True] * 3 + [False] * (len(done_before) - 3)


def test_methods_are_tested_with_their_own_heads(result):
    rows, gates = result[0]["methods"], result[0]["gates"]
    methods = (*ablations.UNTARGETED, *ablations.TARGETED)
    assert [(r["method"], r["sparsity"]) for r in rows] == [
        (m, s) for s in (0.25, 0.75) for m in (*methods, "random")
    ]
    assert {*methods, "random"} == set(ablations_report.METHODS)
    for row in rows:
        if row["method"] == "random":
            assert len(row["exact"]) == 3
            continue
        target = row["sparsity"] if row["method"] in ablations.TARGETED else None
        expected = [
            score(choose_retrieval_heads(g, sparsity=row["sparsity"]), 4, 12)
            for g in of_seeds(gates, row["method"], target)
        ]
        np.testing.assert_allclose(row["exact"], expected)
        assert row["retrieval_heads"] == round(4 * (1 - row["sparsity"]))
    keys = [(row["method"], row["target"], row["seed"]) for row in gates]
    assert len(set(keys)) == len(keys) == 2 * (4 + 2 * 3)
    learned = [json.dumps(row["gates"]) for row in gates if row["method"] in ("optimise", "lm")]
    assert len(set(learned)) == 4


def test_gates_are_those_of_the_identification_command(result, model, tmp_path):
    gates = result[0]["gates"]
    config = default_config(str(model), model)
    for method, target in (("optimise", None), ("profile", None), ("budget", 0.75)):
        values = {"method": method, "seed": 1, "workdir": str(tmp_path / method)}
        identify(type(config)(**(vars(config) | values | {"target_sparsity": target})))
        np.testing.assert_allclose(
            load_pattern(tmp_path / method / "pattern").gates,
            of_seeds(gates, method, target)[1],
            atol=1e-15,  # a file's digits
        )


def test_windows_have_the_same_number_of_slots(result):
    rows = result[0]["windows"]
    learned = of_seeds(result[0]["gates"], "optimise", None)[0]
    pairs = dict.fromkeys((r["identified"], r["deployed"]) for r in rows)
    assert list(pairs) == [
        ("both", "both"), ("sinks", "sinks"), ("recents", "recents"),
        ("both", "sinks"), ("both", "recents"),
    ]  # fmt: skip
    sizes = {"both": (4, 12), "sinks": (15, 1), "recents": (0, 16)}
    for row in rows:
        assert (row["sink"], row["recent"]) == sizes[row["deployed"]]
        if row["identified"] == "both":
            heads = choose_retrieval_heads(learned, sparsity=row["sparsity"])
            np.testing.assert_allclose(row["exact"], score(heads, row["sink"], row["recent"]))


def test_heads_are_identified_with_the_window_that_is_named(model, monkeypatch, tmp_path):
    seen, steps = [], []

    def find_heads(config, model, *_):
        seen.append((config.method, config.seed, config.sink, config.recent, config.reg_weight))
        steps.append(config.num_steps)
        return np.ones((model.num_layers, model.num_kv_heads)), None

    monkeypatch.setattr(ablations, "find_heads", find_heads)
    places = {"workdir": tmp_path / "one"}
    lab = ablations._Lab(AblationsFlags(model=str(model), samples=1, **places))
    lab.identify("optimise", sink=15, recent=1)
    lab.identify("lm", seed=2)
    assert seen == [("optimise", 0, 15, 1, 0.05), ("lm", 2, 4, 12, 0.05)]
    places = {"workdir": tmp_path / "two"}
    lab = ablations._Lab(AblationsFlags(model=str(model), samples=1, lm_reg_weight=0.3, **places))
    lab.identify("lm")
    assert seen[-1] == ("lm", 0, 4, 12, 0.3)
    lab.identify("masks", target=0.5)
    assert steps == [4, 4, 4, 400]


def test_grid_deploys_every_size(result):
    rows = result[0]["sizes"]
    learned = of_seeds(result[0]["gates"], "optimise", None)[0]
    heads = choose_retrieval_heads(learned, sparsity=0.5)
    assert [(r["sink"], r["recent"]) for r in rows] == [(s, r) for s in (0, 4) for r in (3, 12, 20)]
    for row in rows:
        np.testing.assert_allclose(row["exact"], score(heads, row["sink"], row["recent"]))


def test_table_and_picture_show_what_was_measured(result):
    values, out, _ = result
    table = out.with_suffix(".md").read_text()
    for row in values["windows"] + values["sizes"]:
        assert f"| {row['exact']:.1%} |" in table
    profile = values["methods"][1]["exact"]
    assert f"{np.mean(profile):.1%}" in table
    np.testing.assert_allclose(values["largest_standard_error"], 0.01)
    assert "standard error over texts above 1.0%" in table
    np.testing.assert_allclose(values["full"], score(np.ones((1, 4)), 4, 12))
    np.testing.assert_allclose(values["all_streaming"], score(np.zeros((1, 4)), 4, 12))
    with Image.open(out.with_suffix(".png")) as image:
        assert min(image.size) > 900
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize(
    "changes",
    [{"samples": 0}, {"sparsities": ()}, {"grid_sparsities": (1.5,)}, {"recents": (0,)}],
    ids=str,
)
def test_unusable_settings_are_refused(changes):
    with pytest.raises(InputError):
        AblationsFlags(**changes)

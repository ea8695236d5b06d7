"""Masks, and credits of heads, from command to pattern: resumed, warm, for several targets."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

import duo_jax
from duo_jax.checkpoints import pretrained
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkeys import PasskeyConfig, PasskeySampler
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, load_pattern, save_pattern
from train import attribution, masks, optimisation
from train.identify import report, training
from train.identify.__main__ import main
from train.identify.batches import batch_of_one, padded_length
from train.identify.flags import IdentifyConfig
from train.workdir import WorkDir

DATA = PasskeyConfig(min_length=40, max_length=256, num_passkeys=3, passkey_words=4)
SHORT = {"num_steps": 6, "checkpoint_every": 2, "length_buckets": 1, "sink": 4, "recent": 12}
METHODS = {
    "masks": IdentifyConfig(
        method="masks", target_sparsity=0.5, learn_from="both", data=DATA, **SHORT
    ),
    "attribute": IdentifyConfig(method="attribute", target_sparsity=0.5, data=DATA, **SHORT),
}


@pytest.fixture(scope="module")
def given(tiny_model):
    """Return what a search for heads is given, but for flags and work folder."""
    text, _ = split_held_out(load_documents(()))
    sampler = PasskeySampler(DATA, pretrained.load_tokenizer(tiny_model), text, seed=0)
    params = pretrained.load_params(tiny_model, dtype=np.float32)
    return pretrained.load_config(tiny_model), params, sampler


def search(flags, given, path: pathlib.Path):
    workdir = WorkDir(path, flags, operational=("checkpoint_every",))
    try:
        gates, _ = training.train(flags, *given, workdir)
        return gates, workdir.metrics()
    finally:
        workdir.close()


@pytest.fixture(scope="module")
def whole(request, given, tmp_path_factory):
    flags = METHODS[request.param]
    return flags, *search(flags, given, tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["masks"], indirect=True)
def test_a_killed_search_resumes_to_the_same_bits(whole, given, tmp_path, monkeypatch):
    flags, expected, expected_metrics = whole
    seen = []

    def fail_at_fourth(flags, sampler, index, **options):
        seen.append(index)
        if len(seen) == 4:
            raise MemoryError  # as a kill: nothing is saved after it
        return of_step(flags, sampler, index, **options)

    of_step = training.sample_of_step
    monkeypatch.setattr(training, "sample_of_step", fail_at_fourth)
    with pytest.raises(MemoryError):
        search(flags, given, tmp_path / "run")
    gates, metrics = search(flags, given, tmp_path / "run")
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5]
    np.testing.assert_array_equal(gates, expected)
    assert metrics == expected_metrics
    assert (gates > 0.5).sum() == 2


def test_samples_of_masks_take_turns(given):
    _, _, sampler = given

    def kinds(learn_from):
        flags = dataclasses.replace(METHODS["masks"], learn_from=learn_from)
        samples = [training.sample_of_step(flags, sampler, index) for index in range(4)]
        return [len(sample.answers) for sample in samples], samples

    assert [kinds(data)[0] for data in ("text", "passkeys", "both")] == [
        [0] * 4,
        [3] * 4,
        [0, 3] * 2,
    ]
    samples = kinds("both")[1]
    np.testing.assert_array_equal(samples[3].tokens, sampler.sample(1).tokens)
    np.testing.assert_array_equal(samples[2].tokens, sampler.plain_text(1).tokens)


@pytest.mark.parametrize("objective", ["cross_entropy", "divergence"])
def test_of_plain_text_credits_look_at_as_many_last_tokens_as_answers_have(
    given, tmp_path, monkeypatch, objective
):
    """Their likelihood at all of them: only the divergence has two models' logits to keep."""
    batches = []

    def step(state, *data, **_):
        batches.append(data[1])
        metrics = {"loss": 1.0, "mean_gate": 1.0}
        return dataclasses.replace(state, step=state.step + 1), metrics

    monkeypatch.setattr(training.jax, "jit", lambda function: function)
    monkeypatch.setattr(attribution, "train_step", step)
    flags = dataclasses.replace(
        METHODS["attribute"], num_steps=2, learn_from="both", objective=objective
    )
    search(flags, given, tmp_path / "run")
    plain, asked = batches
    size, tail = int(plain.total_length[0]), given[2].longest_tail()
    predicted = np.arange(256) >= (size - tail if objective == "divergence" else 1)
    np.testing.assert_array_equal(plain.answers[0], predicted & (np.arange(256) < size))
    assert int(plain.tail_start[0]) == (size - tail if objective == "divergence" else 0)
    assert 0 < asked.answers.sum() < tail


def test_samples_are_padded_to_the_next_of_a_few_lengths(given):
    flags = dataclasses.replace(METHODS["masks"], length_buckets=4)
    sample = given[2].sample(0)
    padded = {
        size: padded_length(
            dataclasses.replace(sample, tokens=np.resize(sample.tokens, size)), flags
        )
        for size in (1, 64, 65, 255, 256)
    }
    assert padded == {1: 64, 64: 64, 65: 128, 255: 256, 256: 256}


@pytest.mark.parametrize("method", ["budget", "masks"])
def test_a_warm_start_begins_with_the_patterns_order(given, tmp_path, method):
    architecture, _, _ = given
    gates = np.array([[0.1, 0.9], [0.7, 0.3]])
    save_pattern(Pattern(gates=gates, sink_size=1, recent_size=2), tmp_path / "pattern")
    flags = IdentifyConfig(method=method, init=str(tmp_path / "pattern"), data=DATA, **SHORT)
    step = training.step_config(flags, tail_size=100)
    state, _ = training._method(flags, architecture, step)
    assert not isinstance(state, optimisation.GateState)
    values = state.log_alpha if isinstance(state, masks.MaskState) else state.scores
    np.testing.assert_array_equal(np.argsort(values, axis=None), np.argsort(gates, axis=None))
    cold, _ = training._method(dataclasses.replace(flags, init=None), architecture, step)
    other = cold.log_alpha if isinstance(cold, masks.MaskState) else cold.scores
    assert np.abs(values - other).max() > 1


def test_another_models_pattern_is_no_warm_start(given, tmp_path):
    architecture, _, _ = given
    save_pattern(Pattern(gates=np.ones((3, 2)), sink_size=1, recent_size=2), tmp_path / "pattern")
    flags = IdentifyConfig(method="masks", init=str(tmp_path / "pattern"))
    with pytest.raises(InputError, match="the model has 2 x 2"):
        training.warm_start(flags, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["attribute"], indirect=True)
def test_a_target_of_several_is_a_run_of_its_own(tiny_model, tmp_path, whole):
    """It is that of the target alone, to the same bits; and all files are there."""
    _, expected, _ = whole
    words = "--method attribute --num-steps 6 --length-buckets 1 --sink 4 --recent 12"
    words += " --min-length 40 --max-length 256 --num-passkeys 3 --passkey-words 4 --dtype float32"
    words += " --eval-samples 1 --eval-sparsities 0.25 --eval-random-seeds 0"
    words += " --target-sparsities 0.5"
    main(["--model", str(tiny_model), "--workdir", str(tmp_path), *words.split()])
    assert [path.name for path in tmp_path.iterdir()] == ["target-0.5"]
    folder = tmp_path / "target-0.5"
    pattern = load_pattern(folder / "pattern")
    np.testing.assert_array_equal(pattern.gates, expected)
    assert (pattern.gates > 0.5).sum() == 2
    assert pattern.extra["target_sparsity"] == 0.5
    rows = json.loads((folder / "report.json").read_text())["retrieval"]
    assert [row["sparsity"] for row in rows] == [0, 0.25, 0.5, 1]
    for file in ("gates.png", "history.png", "retrieval.png", "metrics.jsonl"):
        assert (folder / file).stat().st_size > 500
    text = (folder / "report.md").read_text()
    assert "credits of the answers along gates from 1 to 0.5, 6 steps, mixing self" in text
    assert "| attributed " in text
    model = duo_jax.load(str(tiny_model), pattern=str(folder / "pattern"), sparsity=0.5)
    assert model.config.num_retrieval_heads == 2


def test_several_targets_have_a_folder_each():
    flags = IdentifyConfig(target_sparsities=(0.5, 0.75), workdir="w", seed=3)
    first, second = flags.runs()
    assert (first.target_sparsity, first.workdir) == (0.5, "w/target-0.5")
    alone = IdentifyConfig(target_sparsity=0.75, workdir="w/target-0.75", seed=3)
    assert second == alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_sparsity": 0.5}, "--target-sparsity is one target, --target-sparsities several"),
        ({"target_sparsities": (0.5, 0.5)}, "--target-sparsities must be different"),
        ({"target_sparsities": (1.5,)}, "is not a number from 0 to 1"),
    ],
)
def test_targets_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        IdentifyConfig(**({"target_sparsities": (0.5,)} | changes))


def test_the_report_says_what_masks_learned_from():
    flags = METHODS["masks"].resolved()
    assert report._how(dataclasses.asdict(flags)) == (
        "masks for 50.0% streaming on text and passkeys, 6 steps, mixing self"
    )


def test_the_seed_decides_the_masks(given):
    architecture, _, _ = given
    step = training.step_config(METHODS["masks"], tail_size=100)
    first, other = (
        training._method(dataclasses.replace(METHODS["masks"], seed=seed), architecture, step)[0]
        for seed in (0, 1)
    )
    assert (first.key != other.key).any()


@pytest.mark.parametrize("learn_from", ["text", "passkeys"])
def test_what_is_predicted_is_all_of_a_text_or_the_answers(given, learn_from):
    flags = dataclasses.replace(METHODS["masks"], learn_from=learn_from)
    sample = training.sample_of_step(flags, given[2], 0)
    answers = np.asarray(batch_of_one(sample, 300).answers[0])
    expected = np.zeros(300, bool)
    for start, stop in sample.answers or [(1, sample.tokens.size)]:
        expected[start:stop] = True
    np.testing.assert_array_equal(answers, expected)
    assert 0 < answers.sum() < sample.tokens.size


def test_masks_of_few_steps_have_larger_ones():
    rates = {
        steps: dataclasses.replace(METHODS["masks"], num_steps=steps).resolved().learning_rate
        for steps in (None, 100, 400, 1000)
    }
    assert rates == {None: 0.1, 100: 0.4, 400: 0.1, 1000: 0.1}
    chosen = dataclasses.replace(METHODS["masks"], learning_rate=0.7).resolved()
    assert (chosen.learning_rate, chosen.mixing) == (0.7, "self")

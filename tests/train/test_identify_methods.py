"""The other ways to find retrieval heads: by attention profile, or language-modelling loss."""

import json
import pathlib

import numpy as np
import pytest

import duo_jax
from duo_jax.checkpoints import pretrained
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkeys import PasskeyConfig, PasskeySampler
from duo_jax.heads import attention_profile as profiling
from duo_jax.heads.pattern import load_pattern
from tests.train.conftest import TINY_FLAGS
from train.identify import profile as profile_module
from train.identify.__main__ import main
from train.identify.batches import batch_of_one

pytestmark = pytest.mark.usefixtures("unhooked_file", "little_text")

PROFILE_FLAGS = (
    "--method profile --profile-samples 5 --checkpoint-every 2 --dtype float32 --sink 4 "
    "--recent 12 --min-length 40 --max-length 256 --num-passkeys 3 --passkey-words 4 "
    "--length-buckets 1 --eval-samples 0"
).split()


def profiled(model, workdir: pathlib.Path, *flags) -> bytes:
    main(["--model", str(model), "--workdir", str(workdir), *PROFILE_FLAGS, *flags])
    return (workdir / "pattern" / "full_attention_heads.tsv").read_bytes()


def metrics_of(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "profile"
    profiled(tiny_model, workdir, "--eval-samples", "2", "--eval-random-seeds", "1")
    return workdir


def test_profile_is_that_of_the_calibration_samples(finished, tiny_model):
    training_text, _ = split_held_out(load_documents(()))
    data = PasskeyConfig(min_length=40, max_length=256, num_passkeys=3, passkey_words=4)
    sampler = PasskeySampler(data, pretrained.load_tokenizer(tiny_model), training_text, seed=0)
    expected = profiling.attention_profile(
        pretrained.load_config(tiny_model),
        pretrained.load_params(tiny_model, dtype=np.float32),
        [sampler.sample(i) for i in range(5)],
        sink_size=4,
        recent_size=12,
    )
    pattern = load_pattern(finished / "pattern")
    np.testing.assert_allclose(pattern.gates, expected, rtol=1e-4)
    assert (pattern.sink_size, pattern.recent_size) == (4, 12)
    assert (pattern.extra["method"], pattern.extra["num_samples"]) == ("profile", 5)
    assert [m["step"] for m in metrics_of(finished)] == [1, 2, 3, 4, 5]


def test_profile_is_reported_drawn_and_served(finished, tiny_model):
    report = json.loads((finished / "report.json").read_text())
    assert [row["heads"] for row in report["retrieval"][1:3]] == ["profiled", "random"]
    assert "attention profile of 5 samples" in (finished / "report.md").read_text()
    assert (finished / "gates.png").exists()
    assert not (finished / "history.png").exists()
    model = duo_jax.load(str(tiny_model), pattern=str(finished / "pattern"), sparsity=0.5)
    assert model.config.num_retrieval_heads == 2
    assert (model.config.sink_size, model.config.recent_size) == (4, 12)


def test_interrupted_profile_resumes_to_the_same_bits(finished, tiny_model, tmp_path, monkeypatch):
    calls = []

    def fail_at_fourth(config, params, sample, **options):
        calls.append(sample)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return profiling.sample_profile(config, params, sample, **options)

    monkeypatch.setattr(profile_module, "sample_profile", fail_at_fourth)
    with pytest.raises(SystemExit):
        profiled(tiny_model, tmp_path / "interrupted")
    expected = (finished / "pattern" / "full_attention_heads.tsv").read_bytes()
    assert profiled(tiny_model, tmp_path / "interrupted") == expected
    assert len(calls) == 4 + 2  # Ctrl-C saved three samples, though two are between checkpoints
    assert metrics_of(tmp_path / "interrupted") == metrics_of(finished)


def test_flags_reach_the_profile(tiny_model, tmp_path, monkeypatch):
    """tests/duo_jax/heads/test_attention_profile.py sees that sizes change the profile."""
    calls = []

    def record(architecture, params, sample, **options):
        del params
        calls.append((options, len(sample.answers)))
        return np.zeros((architecture.num_layers, architecture.num_q_heads), np.float32)

    monkeypatch.setattr(profile_module, "sample_profile", record)
    profiled(tiny_model, tmp_path / "run", "--profile-samples", "9", "--sink", "1", "--recent", "3",
             "--implementation", "interpret", "--min-passkeys", "2")  # fmt: skip
    assert len(calls) == 9
    assert {passkeys for _, passkeys in calls} == {2, 3}
    assert load_pattern(tmp_path / "run" / "pattern").extra["min_passkeys"] == 2
    for options, _ in calls:
        assert (options["sink_size"], options["recent_size"]) == (1, 3)
        assert options["implementation"] == "interpret"


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("profile", ("--num-steps", "7")),
        ("profile", ("--learning-rate", "0.1")),
        ("profile", ("--reg-weight", "0.1")),
        ("profile", ("--target-sparsity", "0.5")),
        ("profile", ("--mixing", "self")),
        ("reconstruct", ("--num-steps", "7")),
        ("reconstruct", ("--chats",)),
        ("lm", ("--min-passkeys", "1")),
        ("optimise", ("--profile-samples", "5")),
        ("budget", ("--profile-samples", "5")),
        ("budget", ("--reg-weight", "0.1")),
        ("lm", ("--profile-samples", "5")),
        ("masks", ("--reg-weight", "0.1")),
        ("attribute", ("--learning-rate", "0.1")),
        ("attribute", ("--init", "pattern")),
        ("budget", ("--votes", "equal")),
        ("masks", ("--objective", "divergence")),
        ("optimise", ("--data", "text")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_a_method_does_not_read_is_refused(tiny_model, tmp_path, capsys, method, flags):
    workdir = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        main(["--model", str(tiny_model), "--workdir", str(workdir), "--method", method, *flags])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"--method {method} does not read {flags[0]}" in error
    assert not workdir.exists()


@pytest.mark.slow
def test_the_preset_of_a_model_is_not_refused(tiny_model, tmp_path):
    """It sets steps and penalty, for whoever optimises."""
    for file in tiny_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "identify.json").write_text(json.dumps({"num_steps": 30, "reg_weight": 0.8}))
    profiled(tmp_path, tmp_path / "run")


@pytest.mark.slow
def test_language_modelling_learns_from_text_alone(tiny_model, tmp_path, monkeypatch):
    """No sample with passkeys is given to the optimiser, and the report says what was optimised."""
    seen = []

    def record(sample, length):
        seen.append(sample)
        return batch_of_one(sample, length)

    monkeypatch.setattr("train.identify.training.batch_of_one", record)
    main(["--model", str(tiny_model), "--workdir", str(tmp_path / "run"), *TINY_FLAGS,
          "--method", "lm", "--num-steps", "3", "--eval-samples", "0"])  # fmt: skip
    assert [(sample.answers, sample.tail_start) for sample in seen] == 3 * [((), 0)]
    for metrics in metrics_of(tmp_path / "run"):
        assert metrics["cross_entropy"] > 1
        np.testing.assert_allclose(
            metrics["loss"], metrics["cross_entropy"] + metrics["penalty"], rtol=1e-6
        )
    assert "language-modelling loss, 3 steps" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "history.png").exists()


@pytest.mark.slow
def test_gates_under_a_budget_are_trained_reported_and_served(tiny_model, tmp_path):
    flags = [*PROFILE_FLAGS[4:], "--method", "budget", "--num-steps", "5"]
    flags += ["--target-sparsity", "0.5", "--checkpoint-every", "2"]
    main(["--model", str(tiny_model), "--workdir", str(tmp_path), *flags])
    metrics = metrics_of(tmp_path)
    assert [m["loss"] for m in metrics] == [m["divergence"] for m in metrics]
    np.testing.assert_allclose([m["mean_gate"] for m in metrics[2:]], 0.5, rtol=1e-5)
    report = (tmp_path / "report.md").read_text()
    assert "gates under a budget for 50.0% streaming, 5 steps, mixing self" in report
    assert (tmp_path / "history.png").exists()
    pattern = load_pattern(tmp_path / "pattern")
    assert (pattern.gates > 0.5).sum() == 2
    assert pattern.extra["target_sparsity"] == 0.5
    model = duo_jax.load(str(tiny_model), pattern=str(tmp_path / "pattern"), sparsity=0.5)
    assert model.config.num_retrieval_heads == 2

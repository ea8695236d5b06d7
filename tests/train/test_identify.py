"""The whole command: outputs, resuming, and input that cannot be used."""

import dataclasses
import importlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from duo_jax.checkpoints import pretrained
from duo_jax.data.passkeys import PasskeyConfig
from duo_jax.heads.pattern import load_pattern
from tests import models
from tests.train.conftest import TINY_FLAGS
from train.identify import training
from train.identify.__main__ import main
from train.identify.flags import IdentifyConfig
from train.identify.report import to_markdown, warning
from train.retrieval_test import RetrievalScores

pytestmark = pytest.mark.usefixtures("unhooked_file", "little_text")

ROOT = pathlib.Path(__file__).parents[2]
MEASURES = ("tokens", "nll", "kl")


def run(model, workdir, *flags) -> None:
    main(["--model", str(model), "--workdir", str(workdir), *TINY_FLAGS, *flags])


def gates_bytes(workdir: pathlib.Path) -> bytes:
    return (workdir / "pattern" / "full_attention_heads.tsv").read_bytes()


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run(tiny_model, workdir)
    return workdir


def test_writes_pattern_pictures_metrics_and_report(finished):
    pattern = load_pattern(finished / "pattern")
    assert pattern.gates.shape == (2, 2)
    assert (pattern.sink_size, pattern.recent_size) == (4, 12)
    assert pattern.gates.min() < 1.0
    assert pattern.extra["model_name"] == "tiny-llama"  # not where it lies
    assert (finished / "report.md").read_text().startswith("# Retrieval heads of tiny-llama\n")
    for picture in ("gates.png", "history.png", "retrieval.png"):
        with Image.open(finished / picture) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    metrics = [json.loads(row) for row in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 25))
    np.testing.assert_allclose(metrics[-1]["mean_gate"], pattern.gates.mean(), rtol=1e-6)


@pytest.mark.slow
def test_a_run_without_any_metrics_still_ends_with_its_report(
    tiny_model, finished, tmp_path, capsys
):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    for file in ("report.md", "history.png"):
        (workdir / file).unlink()
    metrics = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(metrics.replace("distil", "dystil"))
    run(tiny_model, workdir)
    assert "set aside in metrics.damaged.jsonl" in capsys.readouterr().err
    assert (workdir / "history.png").stat().st_size > 5_000
    gates = [(x / "pattern" / "full_attention_heads.tsv").read_text() for x in (finished, workdir)]
    assert gates[0] == gates[1]
    assert "exact retrieval" in (workdir / "report.md").read_text()


def test_pictures_are_drawn_without_pyplot(finished, tmp_path, monkeypatch):
    """Importing train in a notebook must not take its plots away."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    plots = importlib.reload(importlib.import_module("train.identify.plots"))
    plots.save_gates(load_pattern(finished / "pattern"), tmp_path / "gates.png", title="tiny")
    with Image.open(tmp_path / "gates.png") as image:
        assert min(image.size) > 300


def test_report_counts_what_it_claims(finished):
    report = json.loads((finished / "report.json").read_text())
    rows = {(r["heads"], r["sparsity"]): r for r in report["retrieval"]}
    assert set(rows) == {
        ("all retrieval (the model itself)", 0.0),
        ("learned", 0.5),
        ("random", 0.5),
        ("all streaming", 1.0),
    }
    assert rows["random", 0.5]["runs"] == 2
    assert rows["learned", 0.5]["retrieval_heads"] == 2
    length, window = report["samples"]["length"], 16
    np.testing.assert_allclose(rows["all streaming", 1.0]["kv_bytes_kept"], window / length)
    np.testing.assert_allclose(rows["learned", 0.5]["kv_bytes_kept"], (1 + window / length) / 2)
    assert "exact retrieval" in (finished / "report.md").read_text()


def test_report_measures_what_a_weak_model_still_shows(finished):
    """A random model finds no passkey, but its answers have likelihoods that the heads change."""
    report = json.loads((finished / "report.json").read_text())
    rows = {row["heads"]: row for row in report["retrieval"]}
    itself, streaming = rows["all retrieval (the model itself)"], rows["all streaming"]
    assert itself["kl"] is itself["kl_error"] is None
    for row in rows.values():
        assert 0 <= row["tokens"] < 0.5
        assert 4 < row["nll"] < 9  # of 600 tokens, about log(600)
        assert row["nll_error"] > 0
    assert 0 < rows["learned"]["kl"] < streaming["kl"]
    assert itself["nll"] != streaming["nll"]
    table = (finished / "report.md").read_text()
    assert f"{itself['nll']:.3f} ± {2 * itself['nll_error']:.3f} | -" in table
    assert f"{streaming['kl']:.3f} ± {2 * streaming['kl_error']:.3f}" in table


def test_reports_of_earlier_versions_have_fewer_columns(finished):
    report = json.loads((finished / "report.json").read_text())
    del report["warning"]
    for row in report["retrieval"]:
        for name in ("accuracy_error", *(n + e for n in MEASURES for e in ("", "_error"))):
            del row[name]
    written = to_markdown(report)
    assert "| exact retrieval " in written
    assert "NLL" not in written
    assert "±" not in written


def test_a_model_that_finds_no_passkeys_is_told_before_training(
    tiny_model, given_to_the_search, finished, capsys
):
    given_to_the_search("--model", str(tiny_model), *TINY_FLAGS)
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("warning: ")]
    assert "the model itself retrieves 0.0% of these passkeys" in line
    assert "Try --words digits, fewer --passkey-words than 4, fewer --num-passkeys" in line
    top = (finished / "report.md").read_text().splitlines()[2]
    assert top == f"**Careful**: {line.removeprefix('warning: ')}."


def test_what_to_change_is_not_what_was_chosen_already():
    def scores(exact):
        found, nll = np.array([[exact]]), np.array([[1.5]])
        return RetrievalScores(exact=found, tokens=found, nll=nll, kl=None, tails=[])

    data = dataclasses.asdict(PasskeyConfig(words="digits", num_passkeys=1))
    assert warning(scores(0.2), data) is None
    line = warning(scores(0.0), data)
    assert line.endswith("Try a shorter --max-length than 32,000")
    assert "1.50 nats" in line


def test_a_finished_run_is_not_repeated(finished, tiny_model, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    run(tiny_model, finished)
    assert "complete already" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


NO_TEST = ("--eval-samples", "0")  # on which gates do not depend


def test_ended_and_resumed_equals_uninterrupted(finished, tiny_model, tmp_path, monkeypatch):
    """Between checkpoints; test_loop.py has an end at every step, the first ones too."""
    workdir, of_step = tmp_path / "ended", training.sample_of_step

    def fail_at_14th(flags, sampler, index, **options):
        if index == 13:
            raise MemoryError  # as a kill: nothing is saved after it
        return of_step(flags, sampler, index, **options)

    monkeypatch.setattr(training, "sample_of_step", fail_at_14th)
    with pytest.raises(MemoryError):
        run(tiny_model, workdir, *NO_TEST)
    assert not (workdir / "report.md").exists()
    monkeypatch.setattr(training, "sample_of_step", of_step)
    resumes_to_the_same_bits(workdir, finished, tiny_model)


def resumes_to_the_same_bits(workdir, finished, model) -> None:
    metrics = workdir / "metrics.jsonl"
    assert 12 <= metrics.read_text().count("\n") < 24
    run(model, workdir, *NO_TEST)
    assert gates_bytes(workdir) == gates_bytes(finished)
    assert metrics.read_bytes() == (finished / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(finished, tiny_model, tmp_path):
    """The same with SIGKILL, in a process of its own."""
    workdir = tmp_path / "killed"
    metrics = workdir / "metrics.jsonl"
    code = (
        "import sys; from duo_jax.data import documents; text = documents.load_documents([])[:20]\n"
        "documents._built_in = lambda: text\n"  # as little_text does here
        "from train.identify.__main__ import main; main(sys.argv[1:])"
    )
    flags = ["--model", str(tiny_model), "--workdir", str(workdir), *TINY_FLAGS, *NO_TEST]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 12):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "report.md").exists()
    resumes_to_the_same_bits(workdir, finished, tiny_model)


def test_another_configuration_is_refused_by_name(finished, tiny_model, capsys):
    before = gates_bytes(finished)
    with pytest.raises(SystemExit) as exit_:
        run(tiny_model, finished, "--seed", "7", "--passkey-words", "5")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "seed was 0, is 7" in error
    assert "data.passkey_words was 4, is 5" in error
    assert error.count("\n") == 1
    assert gates_bytes(finished) == before


@pytest.mark.parametrize("what", ["text", "weights"])
def test_a_run_belongs_to_what_its_files_hold(tiny_model, tmp_path, capsys, monkeypatch, what):
    """They have the names of those that the run began with, and hold something else."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.identify.training.train", stop)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("Grass is green. The sky is blue.\n" * 400)
    flags = ["--text", str(text), "--eval-samples", "0"]
    for _ in range(2):  # the same files go on
        with pytest.raises(SystemExit) as exit_:
            run(model, tmp_path / "run", *flags)
        assert exit_.value.code == 130
    if what == "text":
        text.write_text("Grass is blue. The sky is green.\n" * 400)
    else:
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"] * 2
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(model, tmp_path / "run", *flags)
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert f"another configuration ({what}_digest was" in said.err
    assert said.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["optimise", "profile"])
def test_flags_decide_weights_and_samples(tiny_model, tmp_path, given_to_the_search, method):
    book = tmp_path / "book.txt"
    book.write_text("It was a dark night and the vault was open. " * 300)
    flags = ["--model", str(tiny_model), "--method", method]
    flags += "--dtype float32 --min-length 40 --max-length 256 --num-passkeys 3 --recent 12".split()
    flags += "--passkey-words 4 --eval-samples 0".split()

    def look(*more: str) -> tuple[np.dtype, list[int]]:
        given = given_to_the_search(*flags, *more)
        return given.params["norm"]["scale"].dtype, given.sampler.sample(0).tokens.tolist()

    dtype, tokens = look()
    assert dtype == np.float32
    assert look("--dtype", "bfloat16") == (jnp.bfloat16, tokens)
    for more in (("--seed", "1"), ("--max-length", "208"), ("--text", str(book))):
        assert look(*more)[0] == np.float32
        assert look(*more)[1] != tokens


def test_chats_are_in_the_models_template(tiny_model, tmp_path, given_to_the_search, capsys):
    flags = "--dtype float32 --min-length 40 --max-length 256 --recent 12 --chats".split()
    flags += ["--num-passkeys", "3", "--passkey-words", "4", "--eval-samples", "0"]
    with pytest.raises(SystemExit):
        main(["--model", str(tiny_model), *flags, "--workdir", str(tmp_path / "none")])
    assert "this model has no chat template; leave out --chats" in capsys.readouterr().err
    folder = shutil.copytree(tiny_model, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    sampler = given_to_the_search("--model", str(folder), *flags).sampler
    tokenizer = pretrained.load_tokenizer(folder)
    plain, chat = (tokenizer.decode(sampler.sample(i).tokens) for i in (0, 1))
    assert "<user>" not in plain
    assert chat.startswith("<user>Here is a long text with passkeys")
    assert chat.count("<assistant>") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "nosuchmodel"), "no such model"),
        (("--model", "org/nosuchmodel"), "org/nosuchmodel"),
        (("--max-length", "4096"), "beyond the model's range of 512"),
        (("--recent", "252"), "4 + 252 tokens sees all of a sample of 256"),
        (("--passkey-words", "200"), "no room for 3 passkeys"),
        (("--text", "/no/such/file"), "no such text"),
        (("--workdir", "/dev/null/run"), "cannot be written"),
        (("--num-steps", "0"), "error: num_steps 0 is not a whole number from 1"),
        (("--num-passkeys", "0"), "num_passkeys 0 is not in 1 to 20"),
        (("--reg-weight", "nan"), "reg_weight nan"),
        (("--eval-sparsities", "1.5"), "is not a number from 0 to 1"),
        (("--tensorboard",), "pip install"),
        (("--no-such-flag",), "--no-such-flag"),
        (("--sink", "many"), "--sink"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_unusable_input_is_one_line_and_exit_code_2(tiny_model, tmp_path, capsys, flags, message):
    workdir = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        run(tiny_model, workdir, *flags)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (workdir / "pattern").exists()
    assert not (workdir / "report.md").exists()


def test_short_text_is_refused_before_anything_is_written(tiny_model, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(SystemExit):
        run(tiny_model, tmp_path / "run", "--text", str(short))
    assert "give more with --text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_models_tokenizer_is_noticed(tmp_path, capsys):
    folder = models.write_hf(tmp_path / "m", models.llama(max_position_embeddings=512))
    models.write_tokenizer(folder)
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "run")
    assert "do they belong together?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_damaged_weights_leave_no_workdir_results(tmp_path, capsys):
    broken = tmp_path / "broken"
    models.write_tokenizer(
        models.write_hf(broken, models.llama(vocab_size=600, max_position_embeddings=512))
    )
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(SystemExit) as exit_:
        run(broken, tmp_path / "run")
    assert exit_.value.code == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_names_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for flag in dataclasses.fields(IdentifyConfig):
        if flag.name not in ("data", "learn_from"):
            assert "--" + flag.name.replace("_", "-") in shown
    assert "--max-length" in shown
    assert "--data {None,text,passkeys,both}" in shown
    assert "--data." not in shown

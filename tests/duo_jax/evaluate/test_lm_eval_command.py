"""`python -m duo_jax.evaluate lm-eval`: results, answers that are kept, and input it refuses."""

import json
import pathlib

import pytest

from duo_jax.evaluate.harness import command as lm_eval_command

pytestmark = pytest.mark.usefixtures("offline")
TASKS = "tests/duo_jax/evaluate/lm_eval_tasks"


def run(tiny_model: pathlib.Path, folder: pathlib.Path, *more: str) -> dict:
    words = ["--model", str(tiny_model), "--pattern", "none", "--include-path", TASKS]
    out = folder / "new" / "results.json"
    words += ["--answers", str(folder / "answers"), "--out", str(out), "--prefill-chunk", "16"]
    words += ["--tasks", "local_say*,local_choose_passkey", "--limit", "2"]
    lm_eval_command.main([*words, *more])
    return json.loads(out.read_text())


def test_results_say_what_they_were_measured_with(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # asks torch: seconds
    result = run(tiny_model, tmp_path, "--seed", "3", "--decode-last", "9")
    assert set(result["results"]) == {"local_choose_passkey", "local_say_passkey"}
    assert "local_choose_passkey" in capsys.readouterr().out
    assert result["seed"] == result["config"]["random_seed"] == 3
    assert result["n-samples"]["local_say_passkey"] == {"original": 4, "effective": 2}
    assert result["command"].startswith("python -m duo_jax.evaluate")
    said = result["duo_jax"]
    expected = {"pattern": "none", "sparsity": 0.0, "retrieval_heads": [2], "kv_heads": 2}
    expected |= {"kv": "model", "weights": "model", "prefill_mode": "exact", "prefill_chunk": 16}
    expected |= {"decode_last": 9, "truncate": "left", "batch_size": 1, "model": str(tiny_model)}
    assert {key: said[key] for key in expected} == expected
    assert {"hardware", "jax", "sink", "recent", "dtype"} <= set(said)
    # A layer x 2 heads x (keys + values) x 8 channels x 4 bytes x 64 tokens, the model's range.
    assert (said["cache_bytes_per_row"], said["cache_tokens_per_row"]) == (8192, 64)

    # A second start asks the model nothing; another model, or another flag, does.
    from duo_jax.evaluate.harness.model import DuoLM

    def refuse(*_, **__):
        raise AssertionError("the model was asked")

    for name in ("_loglikelihood_tokens", "_write"):
        monkeypatch.setattr(DuoLM, name, refuse)
    again = run(tiny_model, tmp_path, "--seed", "3", "--decode-last", "9")
    assert again["results"] == result["results"]
    with pytest.raises(AssertionError, match="the model was asked"):
        run(tiny_model, tmp_path, "--seed", "3", "--decode-last", "8")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "name --tasks"),
        (["--include-path", "nowhere"], "nowhere is not a folder"),
        (["--include-path", "kernels"], "kernels holds no task"),
        (["--tasks", "local_texts,local_nothing"], "no such task: local_texts, local_nothing"),
        (["--include-path", TASKS, "--limit", "0"], "limit 0"),
        (["--include-path", TASKS, "--batch-size", "0"], "batch_size 0"),
        (["--include-path", TASKS, "--max-length", "9999"], "max_length 9,999"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_one_line(words, complaint, capsys, tmp_path, monkeypatch):
    if "--tasks" in words:  # listing the thousands that come with the harness takes seconds
        monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex.build", lambda *_: {})
    with pytest.raises(SystemExit) as exit_:
        lm_eval_command.main([*words, "--out", str(tmp_path / "out.json")])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert complaint in error.splitlines()[-1]


def test_without_the_harness_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(lm_eval_command.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as exit_:
        lm_eval_command.main(["--include-path", TASKS])
    assert exit_.value.code == 2
    assert 'pip install "duo_jax[eval]"' in capsys.readouterr().err

"""The whole command is timed twice; the second time it finds the programs of the first."""

import pytest

from benchmarks import first_token, timed_generate
from duo_jax.errors import InputError
from tests import models


@pytest.fixture
def model(tmp_path):
    raw = models.llama(num_hidden_layers=1) | {"vocab_size": 400}
    folder = models.write_hf(tmp_path / "tiny", raw)
    models.write_tokenizer(folder, vocab_size=400)
    return str(folder)


@pytest.mark.slow
def test_a_cold_and_a_warm_run(model, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # so that compiling takes its time
    flags = first_token.FirstTokenFlags(
        model=model, pattern="none", prompt="some words", max_new_tokens=3
    )
    first_token.main(flags)
    _, _, cold, warm, *_ = capsys.readouterr().out.splitlines()
    assert cold.startswith("| cold |")
    assert warm.startswith("| warm |")
    names = ("cpu", "import", "load", "trace", "compile", "wall")
    parts = [
        dict(zip(names, map(float, line.strip("| ").split(" | ")[1:]), strict=True))
        for line in (cold, warm)
    ]
    for run in parts:
        assert run["cpu"] >= run["import"] + run["load"] > 0
    assert parts[1]["compile"] < parts[0]["compile"]


@pytest.mark.slow
def test_a_command_that_fails(model):
    flags = first_token.FirstTokenFlags(model=model, prompt="")
    with pytest.raises(InputError, match="the command failed: the prompt is empty"):
        first_token.measure(flags)


@pytest.mark.parametrize(
    ("spans", "length"), [([], 0), ([(0, 2), (1, 2)], 2), ([(5, 6), (0, 2), (1, 3)], 4)]
)
def test_what_is_traced_inside_of_another_program_counts_once(spans, length):
    assert timed_generate.union(spans) == length

"""A pretrained model's results: the commands of its steps, what is collected, and the page."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import real_model
from benchmarks.real import ruler, tables
from benchmarks.real.steps import Sizes, all_steps
from duo_jax import cli
from duo_jax.checkpoints import pretrained
from duo_jax.evaluate import __main__ as evaluate
from duo_jax.heads.pattern import Pattern, save_pattern

pytestmark = pytest.mark.usefixtures("little_text")
SIZES = Sizes(
    lengths=(400,),
    samples=(2,),
    ruler_limits=(),
    passkeys=(2,),
    needle_depths=2,
    sparsities=(0.5,),
    perplexity_length=300,
    perplexity_samples=2,
    perplexity_sparsities=(0.5,),
)


def flags(tiny, tmp_path, **changes) -> real_model.RealModelFlags:
    made = real_model.RealModelFlags(
        model=str(tiny),
        pattern=str(tiny / "pattern"),
        only=("passkeys", "needle", "perplexity"),
        work=tmp_path / "work",
        results=tmp_path / "results",
        page=tmp_path / "page.md",
        sizes=SIZES,
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.slow
def test_steps_are_run_once_collected_and_shown(tiny, tmp_path, started):
    real_model.main(flags(tiny, tmp_path))
    assert [words[0] for words in started] == ["perplexity"] * 2 + ["passkeys"] * 2 + ["needle"] * 2
    about = json.loads((tmp_path / "results/about.json").read_text())
    assert about["parts"] == ["perplexity", "passkeys-2", "needle"]
    assert about["missing"]["formats"] == ["formats-perplexity"]
    page = (tmp_path / "page.md").read_text()
    assert "\n- formats-perplexity\n" in page.split("## Not measured yet")[1]
    assert page.count("| 50% streaming |") == 6  # two tables of each part
    assert str(tmp_path) not in page.replace(str(tmp_path / "results"), "")
    assert "real_model --model MODEL --pattern PATTERN --lengths 400 --needle-depths 2" in page
    for part in about["parts"]:
        assert (tmp_path / f"results/{part}.png").read_bytes().startswith(b"\x89PNG")

    found = json.loads((tmp_path / "results/passkeys-2.json").read_text())
    split = found["passkeys-2-400-50"]
    assert split["row"] == "50% streaming"
    texts = {}
    for row in split["result"]["rows"]:
        texts.setdefault(row["sample"], []).append(row["nll"])
    means = np.mean(list(texts.values()), axis=1)
    error = 2 * means.std(ddof=1) / 2**0.5
    assert f"| 50% streaming | {means.mean():.3f} ± {error:.3f} |" in page

    started.clear()
    real_model.main(flags(tiny, tmp_path))
    assert not started
    assert (tmp_path / "page.md").read_text() == page

    other = Pattern(gates=np.array([[0.1, 0.9, 0.2, 0.8]]), sink_size=4, recent_size=12)
    save_pattern(other, tmp_path / "other")
    changed = flags(tiny, tmp_path, pattern=str(tmp_path / "other"), only=("needle",))
    real_model.main(changed)
    assert [words[0] for words in started] == ["needle"]  # full caches depend on no pattern


@pytest.mark.slow
def test_a_step_that_fails_is_named_after_the_others_are_run(tiny, tmp_path, started, capsys):
    sizes = dataclasses.replace(SIZES, perplexity_length=9_000)
    with pytest.raises(real_model.InputError, match="failed: perplexity-full, "):
        real_model.main(flags(tiny, tmp_path, sizes=sizes, only=("perplexity", "needle-400-full")))
    assert len(started) == 3
    assert "the model's range of 512" in capsys.readouterr().err
    assert "| full caches |" in (tmp_path / "page.md").read_text()


def test_no_step_starts_late(tiny, tmp_path, started):
    real_model.main(flags(tiny, tmp_path, minutes=0.0))
    assert not started


def test_every_steps_flags_parse(monkeypatch, tmp_path):
    seen: list[object] = []
    run = cli.run
    monkeypatch.setattr(cli, "run", lambda _, kind, **more: run(seen.append, kind, **more))
    demo = pretrained.resolve(pretrained.DEMO)
    monkeypatch.setattr(pretrained, "resolve", lambda *_, **__: demo)
    sizes = Sizes(lengths=(1024, 8192), samples=(2, 1), ruler_limits=(3,), sparsities=(0.5,))
    steps = all_steps(sizes, "P", tmp_path)
    pattern = Pattern(gates=np.zeros((1, 1)), sink_size=4, recent_size=12)
    for step in steps:
        evaluate.main(step.command("M", step.folder(tmp_path, "M", pattern)))
    assert len(seen) == len(steps)
    assert len({step.name for step in steps}) == len(steps)
    assert len({step.folder(tmp_path, "M", pattern) for step in steps}) == len(steps)


def test_scores_of_ruler_are_those_of_questions():
    result = {
        "results": {"niah": {"alias": "niah", "1024,none": 0.75, "4096,none": -1.0}},
        "n-samples": {"niah": {"original": 500, "effective": 4}},
    }
    found = {"ruler-1024-full": {"row": "full caches", "result": result}}
    assert ruler.tasks(found) == ["niah"]
    [right] = ruler.scores(found, "niah")["full caches"].items()
    assert right[0] == 1024
    assert sorted(right[1]) == [0.0, 1.0, 1.0, 1.0]


def test_what_was_not_measured_is_a_dash():
    texts = {"full": {1024: np.ones(2), 2048: np.zeros(3)}, "duo": {1024: np.ones(1)}}
    table = tables.to_markdown("score", texts, lambda values: f"{values.mean():g}")
    assert "| score | 1,024 tokens (2 texts) | 2,048 tokens (3 texts) |" in table
    assert "| duo | 1 | - |" in table

"""Pictures of a run, whatever is left of its metrics and however its model is named."""

import io

import numpy as np
import pytest
from PIL import Image

from duo_jax.heads.pattern import Pattern
from duo_jax.reports import figures
from train.identify import plots

WHOLE = {"distillation": 0.5, "mean_gate": 0.6, "gates_above_half": 0.75}
METRICS = {
    "none": [],
    "only steps": [{"step": 1}, {"step": 2}],
    "the first line lacks the loss": [{"step": 1, "mean_gate": 0.5}, {"step": 2, **WHOLE}],
    "the last line lacks all": [{"step": 1, **WHOLE}, {"step": 2}],
    "not measured": [{"step": 1, **dict.fromkeys(WHOLE)}],
    "no gates": [{"step": 1, "cross_entropy": 2.0}],
    "huge": [{"step": 2**31 - 1, **dict.fromkeys(WHOLE, 4e38)}, {"step": 1, **WHOLE}],
}
TITLES = ["", "x$\\frac$", "a$b$", "$", "\\$5", "half \ud800", "x" * 500, "two\nlines"]


def has_ink(path):
    with Image.open(path) as image:
        return min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 10


any_title = pytest.mark.filterwarnings(
    "ignore:constrained_layout not applied", "ignore:Tight layout"
)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("case", "title"), [*zip(METRICS, TITLES[1:], strict=True)])
@any_title
def test_history_is_drawn_from_what_there_is(case, title, tmp_path):
    plots.save_history(METRICS[case], tmp_path / "history.png", title=title)
    assert has_ink(tmp_path / "history.png")


def test_an_empty_history_says_so(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, *_, **__: drawn.append(figure))
    plots.save_history([], tmp_path / "history.png", title="tiny")
    assert [text.get_text() for axes in drawn[0].axes for text in axes.texts] == ["no metrics"] * 2


def test_losses_of_steps_that_take_turns_are_lines_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, *_, **__: drawn.append(figure))
    metrics = [{"step": step, "cross_entropy": step % 2 + 1.0} for step in (1, 2, 3, 5)]
    turns = ("plain text", "passkeys")
    plots.save_history(metrics, tmp_path / "history.png", title="tiny", turns=turns)
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines == {"plain text": [[1, 2], [3, 2], [5, 2]], "passkeys": [[2, 1]]}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("title", TITLES)
@any_title
def test_any_name_can_stand_above_a_picture(title, tmp_path):
    pattern = Pattern(gates=np.ones((2, 2)), sink_size=1, recent_size=2)
    plots.save_gates(pattern, tmp_path / "gates.png", title=title, value=title)
    assert has_ink(tmp_path / "gates.png")


def test_names_are_shown_as_they_are_written():
    def picture(title, **above):
        figure, axes = figures.new_figure(3.0, 2.0)
        axes.set_title(title, **above)
        axes.plot([1, 10], [1, 1000], label=title)
        axes.legend()
        figure.suptitle(title, **above)
        return np.asarray(Image.open(io.BytesIO(figures.png(figure))))

    assert np.array_equal(picture("a$b$"), picture("a$b$", parse_math=False))
    assert not np.array_equal(picture("a$b$"), picture("ab"))


def test_a_logarithmic_axis_keeps_its_powers():
    figure, axes = figures.new_figure(3.0, 2.0)
    axes.plot([1, 2], [1, 1e6])
    axes.set_yscale("log")
    figures.png(figure)
    labels = axes.get_yticklabels()
    assert any("^" in label.get_text() for label in labels)
    assert all(label.get_parse_math() for label in labels)

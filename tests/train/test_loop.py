"""The loop of a long run: killed anywhere and resumed, it ends with the same bits."""

import contextlib
import dataclasses
import json
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from duo_jax import files
from duo_jax.process import signals
from train import loop
from train.loop import run_steps
from train.workdir import WorkDir

STEPS, EVERY = 7, 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    total: jax.Array


class _KilledError(Exception):
    """Ends a run as a kill does: nothing is written after it."""


def run(path, *, fail_at: int | None = None, error: type[BaseException] = _KilledError):
    """Return the last state, the seconds of a step, and the numbers of the steps that were done."""
    workdir, done = WorkDir(path, {"seed": 0}, operational=()), []

    def step(state: State) -> tuple[State, dict[str, float]]:
        index = int(state.step)
        if index == fail_at:
            raise error
        done.append(index)
        total = state.total * 1.1 + index
        return State(step=state.step + 1, total=total), {"total": float(total)}

    try:
        state = workdir.restore(State(step=jnp.int32(0), total=jnp.float32(0)))
        state, seconds = run_steps(
            workdir,
            state,
            step,
            tqdm(total=STEPS, initial=int(state.step), disable=True),
            finished=lambda state: int(state.step) >= STEPS,
            checkpoint_every=EVERY,
            shown=("total",),
        )
    finally:
        workdir.close()
    return state, seconds, done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    state, seconds, done = run(path)
    assert done == list(range(STEPS))
    assert seconds is not None
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    return path, state


@pytest.mark.one_in(3)
@pytest.mark.parametrize("fail_at", range(STEPS))
def test_a_run_killed_at_any_step_goes_on_from_the_last_checkpoint(whole, tmp_path, fail_at):
    path, expected = whole
    with pytest.raises(_KilledError):
        run(tmp_path / "run", fail_at=fail_at)
    state, _, done = run(tmp_path / "run")
    assert done == list(range(fail_at // EVERY * EVERY, STEPS))
    np.testing.assert_array_equal(state.total, expected.total)
    metrics = "metrics.jsonl"
    assert (tmp_path / "run" / metrics).read_bytes() == (path / metrics).read_bytes()


def test_without_a_terminal_a_line_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    run(tmp_path / "short")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(loop, "_LINE_EVERY", 0.0)
    run(tmp_path / "long")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == STEPS
    assert re.fullmatch(r"\[step 3 of 7, total 3\.1000; 0\.\d\d s a step\]", lines[2])


def test_ctrl_c_loses_no_step(whole, tmp_path, capsys):
    path, expected = whole
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", fail_at=5, error=KeyboardInterrupt)
    assert "[saved after step 5: the same command goes on from there]" in capsys.readouterr().err
    state, _, done = run(tmp_path / "run")
    assert done == [5, 6]
    np.testing.assert_array_equal(state.total, expected.total)
    metrics = "metrics.jsonl"
    assert (tmp_path / "run" / metrics).read_bytes() == (path / metrics).read_bytes()


class _FromJaxError(Exception):
    """What jax makes of a signal that comes inside of a callback."""

    def __init__(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def _terminate_before(write, step_of):
    def signalled(self, *args, **settings):
        if step_of(*args) == 5:
            signal.raise_signal(signal.SIGTERM)
        return write(self, *args, **settings)

    return signalled


@pytest.mark.one_in(2)
@pytest.mark.parametrize("where", ["a callback of jax", "log", "save"])
def test_a_signal_loses_no_step_wherever_it_comes(whole, tmp_path, monkeypatch, where):
    """With "save", a second one comes while step 5 is saved on the first one's account."""
    path, expected = whole
    with monkeypatch.context() as patch:
        patch.setattr(signals, "_ONE", 0.0)
        if where == "log":
            log = _terminate_before(files.append_text, lambda text: json.loads(text)["step"])
            patch.setattr(files, "append_text", log)
        if where == "save":
            save = _terminate_before(CheckpointManager.save, lambda step: step)
            patch.setattr(CheckpointManager, "save", save)
        fail_at = None if where == "log" else 5
        with pytest.raises(SystemExit) as ended:
            signals.run(lambda: run(tmp_path / "run", fail_at=fail_at, error=_FromJaxError))
        assert ended.value.code == 143
    state, _, done = run(tmp_path / "run")
    assert done == [5, 6]
    np.testing.assert_array_equal(state.total, expected.total)
    metrics = "metrics.jsonl"
    assert (tmp_path / "run" / metrics).read_bytes() == (path / metrics).read_bytes()


def test_a_finished_run_does_nothing(whole):
    path, expected = whole
    before = (path / "metrics.jsonl").read_bytes()
    state, seconds, done = run(path)
    assert (seconds, done) == (None, [])
    np.testing.assert_array_equal(state.total, expected.total)
    assert (path / "metrics.jsonl").read_bytes() == before

"""The loop of every long run: steps, metrics, checkpoints, a progress bar."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from duo_jax.process import signals
from train.workdir import State, WorkDir

_LINE_EVERY = 60.0  # seconds, where there is no terminal for a bar


def run_steps(
    workdir: WorkDir,
    state: State,
    step: Callable[[State], tuple[State, dict[str, Any]]],
    bar: tqdm,
    *,
    finished: Callable[[State], bool],
    checkpoint_every: int,
    shown: Sequence[str] = (),
) -> tuple[State, float | None]:
    """Call `step` until the run is finished; write its metrics, and checkpoints of the state.

    Ctrl-C and SIGTERM save the state after the last complete step, so that nothing is lost, and say
    how to go on.

    Args:
      workdir: where metrics and checkpoints go.
      state: as `workdir.restore` returned it; `state.step` counts the steps that are done.
      step: does one step; returns the state after it and its metrics, as JSON holds them. It must
        depend on the state alone, or a resumed run would not end with the same bits.
      bar: the progress bar, which begins at `state.step`; closed at the end. Where it is off, as in
        a log file, a line a minute says the same.
      finished: whether a state is the last.
      checkpoint_every: steps between checkpoints.
      shown: names of the metrics that the bar shows.

    Returns:
      The last state, which has been saved, and the seconds of a step: the median, which leaves out
      the few steps that compiled; None where all was done already.
    """
    durations = []
    last_line = time.monotonic()
    with bar:
        try:
            while not finished(state):
                began = time.monotonic()
                new_state, metrics = step(state)
                durations.append(time.monotonic() - began)
                number = int(new_state.step)
                with signals.put_off():  # a step is counted and logged, or neither
                    workdir.log({"step": number} | metrics)
                    state = new_state
                values = {name: f"{metrics[name]:.4f}" for name in shown}
                bar.set_postfix(values, refresh=False)
                bar.update()
                if bar.disable and time.monotonic() >= last_line + _LINE_EVERY:
                    last_line = time.monotonic()
                    print(_line(bar, number, values, durations), file=sys.stderr, flush=True)
                if number % checkpoint_every == 0:
                    workdir.save(state)
                signals.check()
        except BaseException as error:
            if signals.is_interruption(error):
                workdir.save(state)
                said = f"[saved after step {int(state.step)}: the same command goes on from there]"
                bar.write(said, file=sys.stderr)
            raise
    workdir.save(state)
    return state, float(np.median(durations)) if durations else None


def _line(bar: tqdm, number: int, values: dict[str, str], durations: list[float]) -> str:
    """Say how far a run is: the step, its metrics, and the median seconds of a step."""
    of_all = f" of {bar.total:,.0f}" if bar.total else ""
    metrics = "".join(f", {name} {value}" for name, value in values.items())
    return f"[step {number:,}{of_all}{metrics}; {np.median(durations):.2f} s a step]"

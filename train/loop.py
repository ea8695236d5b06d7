"""The loop of every long run: steps, metrics, checkpoints, a progress bar."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from duo_jax.process import signals
from train.workdir import State, WorkDir


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
      bar: the progress bar, which begins at `state.step`; closed at the end.
      finished: whether a state is the last.
      checkpoint_every: steps between checkpoints.
      shown: names of the metrics that the bar shows.

    Returns:
      The last state, which has been saved, and the seconds of a step: the median, which leaves out
      the few steps that compiled; None where all was done already.
    """
    durations = []
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
                bar.set_postfix({name: f"{metrics[name]:.4f}" for name in shown}, refresh=False)
                bar.update()
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

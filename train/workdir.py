"""The work folder of a long run: its settings, metrics and checkpoints.

A step's result depends only on the state before it and on the step's number, and a checkpoint
holds the whole state, so a killed run that is started again ends with the same bits.
"""

import gc
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import orbax.checkpoint as ocp

from duo_jax import files
from duo_jax.checkpoints.orbax_checkpoint import quiet_orbax
from duo_jax.cli import workdir
from duo_jax.errors import InputError
from duo_jax.process import signals


@runtime_checkable
class HasStep(Protocol):
    """A pytree that counts the steps it has seen."""

    @property
    def step(self) -> Any:
        """Steps that are done, an integer scalar."""
        ...


State = TypeVar("State", bound=HasStep)


class WorkDir:
    """A work folder that belongs to exactly one run's settings; made if it does not exist.

    Raises:
      InputError: as `duo_jax.cli.workdir.claim` does.
    """

    def __init__(self, path: pathlib.Path, settings: Any, *, operational: Sequence[str]) -> None:
        self._claim = workdir.claim(path, settings, operational=operational)
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        with files.writing(path):
            self._checkpoints = ocp.CheckpointManager(
                (path / "checkpoints").absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2, enable_async_checkpointing=False
                ),
            )

    def restore(self, state: State) -> State:
        """Return the latest checkpoint, or `state` where there is none; metrics are cut to fit.

        Where the latest cannot be read and the one before it can, that one serves, and the latest
        is set aside with a line on stderr.

        Raises:
          InputError: no checkpoint can be read; all is left as it was.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._checkpoints.all_steps(), reverse=True):
            try:
                with quiet_orbax():
                    state = self._read(step, state)
                break
            except Exception as error:  # orbax and tensorstore have no common error for damage
                signals.check()  # which they may have turned into it
                damaged[step] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            gc.collect()  # while orbax' late complaints are still silenced
        else:
            if damaged:
                raise InputError(
                    f"no checkpoint in {self._checkpoints.directory} can be read "
                    f"({next(iter(damaged.values()))}); with another --workdir the run begins anew"
                )
        for step, reason in damaged.items():
            self._set_aside(step, reason)
        done = int(state.step)
        kept = [m for m in self.metrics() if m["step"] <= done]
        files.write_text(self.metrics_file, "".join(json.dumps(m) + "\n" for m in kept))
        return state

    def _read(self, step: int, like: State) -> State:
        leaves = self._checkpoints.restore(
            step, args=ocp.args.StandardRestore(jax.eval_shape(_named_leaves, like))
        )
        return jax.tree.unflatten(
            jax.tree.structure(like), [leaves[n] for n in _named_leaves(like)]
        )

    def _set_aside(self, step: int, reason: str) -> None:
        aside = self.path / f"damaged-checkpoint-{step}"
        count = itertools.count(2)
        while aside.exists():
            aside = self.path / f"damaged-checkpoint-{step}-{next(count)}"
        with files.writing(aside):
            (self._checkpoints.directory / str(step)).rename(aside)
        self._checkpoints.reload()
        print(
            f"the checkpoint of step {step} cannot be read ({reason}); it is now in {aside}, and "
            "the run goes on from an earlier one",
            file=sys.stderr,
        )

    def save(self, state: HasStep) -> None:
        """Write a checkpoint; it counts only once it is complete. Signals wait for that.

        Raises:
          InputError: it cannot be written.
        """
        if self._checkpoints.latest_step() != int(state.step):
            with signals.put_off(), files.writing(self.path), quiet_orbax():
                self._checkpoints.save(
                    int(state.step), args=ocp.args.StandardSave(_named_leaves(state))
                )

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a step's metrics.

        Raises:
          InputError: they cannot be written.
        """
        files.append_text(self.metrics_file, json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Read the metrics so far, without a last line that a kill cut short."""
        if not self.metrics_file.exists():
            return []
        read = []
        for line in files.read_text(self.metrics_file).splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(record, dict) or "step" not in record:
                break
            read.append(record)
        return read

    def close(self) -> None:
        """Release the checkpoint manager's threads."""
        self._checkpoints.close()


def _named_leaves(state: Any) -> dict[str, jax.Array]:
    """Name every array; a plain dict can be restored without the optimiser's classes."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in paths}

"""The work folder of a long run: its settings, metrics and checkpoints.

A step's result depends only on the state before it and on the step's number, and a checkpoint
holds the whole state, so a killed run that is started again ends with the same bits.
"""

import gc
import itertools
import math
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
import orbax.checkpoint as ocp
from msgspec import Meta

from duo_jax import files
from duo_jax.checkpoints.orbax_checkpoint import orbax_path
from duo_jax.checkpoints.quiet_orbax import quiet_orbax
from duo_jax.cli import workdir
from duo_jax.errors import InputError, cut
from duo_jax.process import signals
from duo_jax.schema import checksums, json_lines
from duo_jax.schema.check import convert
from duo_jax.schema.kinds import Count

# Metrics are float32 on the device.
_Number = Annotated[int, Meta(ge=-(2**53), le=2**53)] | Annotated[float, Meta(ge=-4e38, le=4e38)]
_Metrics = dict[str, _Number | None]  # null: not measured, or not finite
_NOTES = "_CHECKPOINT_METADATA"  # the file of orbax' notes on a checkpoint
_DIGEST = "checksum"  # its name among the arrays of a checkpoint
_LONGEST_REASON = 500  # characters; tensorstore's errors end with what is wrong


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
        files.check_folder(path / "checkpoints")
        with files.writing(path), quiet_orbax():  # it looks at what is there
            self._checkpoints = _open(orbax_path(path / "checkpoints"))

    def restore(self, state: State) -> State:
        """Return the latest checkpoint, or `state` where there is none; metrics are cut to fit.

        Where the latest cannot be read, or holds another step than its name says, the one before it
        serves if it can, and the latest is set aside with a line on stderr. Another line says where
        a run has begun and has no checkpoint: it was killed before its first one, or lost them.

        Raises:
          InputError: no checkpoint can be read; all is left as it was.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._checkpoints.all_steps(), reverse=True):
            with quiet_orbax():  # asyncio complains of lost tasks when their errors are forgotten
                try:
                    with quiet_orbax():
                        found = self._read(step, state)
                    if int(found.step) != step:  # its folder was renamed, or copied
                        raise ValueError(f"it holds the state of step {int(found.step):,}")
                    state = found
                    break
                except Exception as error:  # orbax and tensorstore have no common one for damage
                    signals.check()  # which they may have turned into it
                    reason = " ".join(str(error).split())
                    damaged[step] = f"{type(error).__name__}: {cut(reason, _LONGEST_REASON)}"
                gc.collect()
        else:
            if damaged:
                raise InputError(
                    f"no checkpoint in {self._checkpoints.directory} can be read "
                    f"({next(iter(damaged.values()))}); with another --workdir the run begins anew"
                )
        for step, reason in damaged.items():
            self._set_aside(step, reason)
        began = files.exists(self.metrics_file)
        done, metrics = int(state.step), self.metrics()
        if began and not self._checkpoints.all_steps():
            print(
                f"{self.metrics_file} knows {len(metrics):,} steps, but there is no checkpoint in "
                f"{self._checkpoints.directory}: the run begins anew",
                file=sys.stderr,
            )
        json_lines.write(self.metrics_file, [m for m in metrics if m["step"] <= done])
        return state

    def _read(self, step: int, like: State) -> State:
        expected = jax.eval_shape(_named_leaves, like)
        if _DIGEST in (self._checkpoints.item_metadata(step) or {}):  # earlier versions wrote none
            expected[_DIGEST] = jax.ShapeDtypeStruct((16,), np.uint8)
        leaves = dict(self._checkpoints.restore(step, args=ocp.args.StandardRestore(expected)))
        if _DIGEST in leaves and (leaves.pop(_DIGEST) != _digest(leaves)).any():
            raise ValueError("its values are not those that were written")
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
            leaves = _named_leaves(state)
            leaves |= {_DIGEST: _digest(leaves)}  # tensorstore checks only what describes arrays
            with signals.put_off(), files.writing(self.path), quiet_orbax():
                self._checkpoints.save(int(state.step), args=ocp.args.StandardSave(leaves))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a step's metrics: numbers; one that is not finite is written as null.

        Raises:
          InputError: they cannot be written.
        """
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in record.items()}
        json_lines.append(self.metrics_file, finite)

    def metrics(self) -> list[dict[str, Any]]:
        """Read the metrics so far; damaged lines are set aside with a line on stderr.

        Raises:
          InputError: the file cannot be read.
        """
        return json_lines.read(
            self.metrics_file, _check, lost="the run goes on without these metrics"
        )

    def close(self) -> None:
        """Release the checkpoint manager's threads."""
        self._checkpoints.close()


def _open(folder: pathlib.Path) -> ocp.CheckpointManager:
    """Open the checkpoints in a folder; notes that orbax cannot read are removed.

    They hold a checkpoint's time and the names of orbax' classes, and it can do without.
    """
    # Of saves that were killed or failed. orbax' own cleanup_tmp_directories leaves them for long.
    for left in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()
    try:
        return ocp.CheckpointManager(folder, item_handlers=handler, options=options)
    except OSError:
        raise
    except Exception as error:  # of no common type
        signals.check()  # which orbax may have turned into it
        print(
            f"orbax' notes on the checkpoints in {folder} are damaged and removed "
            f"({cut(' '.join(str(error).split()), 200)}); the arrays are checked by themselves",
            file=sys.stderr,
        )
        for notes in folder.glob(f"*/{_NOTES}"):
            notes.unlink()
        return ocp.CheckpointManager(folder, item_handlers=handler, options=options)


def _check(values: dict[str, Any], where: str) -> dict[str, Any]:
    metrics = convert(values, _Metrics, where)
    convert(metrics.get("step"), Count, f"{where}, step")
    return metrics


def _digest(leaves: Mapping[str, jax.Array]) -> np.ndarray:
    """Return the checksum of all values and their names, as bytes [16]."""
    found = {name: checksums.of_array(np.asarray(leaf)) for name, leaf in sorted(leaves.items())}
    return np.frombuffer(bytes.fromhex(checksums.of_bytes(repr(found).encode())), np.uint8)


def _named_leaves(state: Any) -> dict[str, jax.Array]:
    """Name every array; a plain dict can be restored without the optimiser's classes."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in paths}

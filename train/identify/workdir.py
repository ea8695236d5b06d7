"""The work folder of a run: its config, metrics and checkpoints, and how a run resumes.

A step's result depends only on the state before it and on the step's number, and a checkpoint
holds the whole state, so a killed run that is started again ends with the same bits.
"""

import dataclasses
import json
import os
import pathlib

import jax
import orbax.checkpoint as ocp

from duo_jax import files
from duo_jax.errors import InputError
from train.identify.config import IdentifyConfig
from train.optimisation import GateState

# Fields that may differ when a run is resumed: they do not change its result.
_OPERATIONAL = ("workdir", "checkpoint_every", "tensorboard")


class WorkDir:
    """Opens or creates a work folder for exactly one configuration.

    Raises:
      InputError: the folder cannot be written, or holds a run of another configuration.
    """

    def __init__(self, path: pathlib.Path, config: IdentifyConfig) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise InputError(f"workdir {path} cannot be written: {error.strerror}") from None
        self._claim(config)
        self._checkpoints = ocp.CheckpointManager(
            (path / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )

    def _claim(self, config: IdentifyConfig) -> None:
        file = self.path / "config.json"
        # Through JSON, so that tuples and lists compare equal.
        mine = json.loads(json.dumps(dataclasses.asdict(config)))
        if file.exists():
            try:
                theirs = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"{file} cannot be read: {error}") from None
            changed = [
                f"{name} was {before!r}, is {after!r}"
                for (name, before), after in zip(
                    _flat(theirs, mine).items(), _flat(mine, theirs).values(), strict=True
                )
                if before != after and name not in _OPERATIONAL
            ]
            if changed:
                raise InputError(
                    f"{self.path} holds a run of another configuration ({'; '.join(changed)}); "
                    "choose another --workdir, or repeat the run's own settings"
                )
        files.write_text(file, json.dumps(mine, indent=2) + "\n")

    def restore(self, state: GateState) -> GateState:
        """Return the latest checkpoint, or `state` where there is none; metrics are cut to fit."""
        step = self._checkpoints.latest_step()
        if step is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = self._checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
        done = int(state.step)
        kept = [m for m in self.metrics() if m["step"] <= done]
        files.write_text(self.metrics_file, "".join(json.dumps(m) + "\n" for m in kept))
        return state

    def save(self, state: GateState) -> None:
        """Write a checkpoint; it counts only once it is complete."""
        if self._checkpoints.latest_step() != int(state.step):
            self._checkpoints.save(int(state.step), args=ocp.args.StandardSave(state))

    def metrics(self) -> list[dict[str, float]]:
        """Read the metrics so far, without a last line that a kill cut short."""
        if not self.metrics_file.exists():
            return []
        read = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                read.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return read

    def close(self) -> None:
        """Release the checkpoint manager's threads."""
        self._checkpoints.close()


def _flat(values: dict, other: dict, prefix: str = "") -> dict:
    """Flatten nested settings to dotted names, over the union of both sides' names."""
    flat = {}
    for name in sorted(values.keys() | other.keys()):
        mine, theirs = values.get(name), other.get(name)
        if isinstance(mine, dict) or isinstance(theirs, dict):
            flat |= _flat(mine or {}, theirs or {}, f"{prefix}{name}.")
        else:
            flat[prefix + name] = mine
    return flat

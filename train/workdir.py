"""The work folder of a long run: its config, metrics and checkpoints, and how a run resumes.

A step's result depends only on the state before it and on the step's number, and a checkpoint
holds the whole state, so a killed run that is started again ends with the same bits.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import orbax.checkpoint as ocp

from duo_jax import files
from duo_jax.errors import InputError

_CONFIG_FILE = "config.json"


@runtime_checkable
class _HasStep(Protocol):
    step: Any


State = TypeVar("State", bound=_HasStep)


def check(path: pathlib.Path, config: Any, *, operational: Sequence[str]) -> None:
    """Refuse a work folder that cannot be used, before hours are spent; writes nothing.

    Args:
      path: the folder; need not exist.
      config: the run's settings, a dataclass.
      operational: its fields that may differ when a run is resumed, as they do not change results.

    Raises:
      InputError: the folder cannot be written, or holds a run of another configuration.
    """
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"workdir {path} cannot be written")
    file = path / _CONFIG_FILE
    if not file.exists():
        # A kill may have left our own temporary file.
        if path.exists() and any(not p.name.startswith(".config") for p in path.iterdir()):
            raise InputError(f"workdir {path} holds other files; choose an empty or new folder")
        return
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    before, after = _flat(theirs), _flat(_as_json(config))
    changed = [
        f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in operational
    ]
    if changed:
        raise InputError(
            f"{path} holds a run of another configuration ({'; '.join(changed)}); "
            "choose another --workdir, or repeat the run's own settings"
        )


class WorkDir:
    """A work folder that belongs to exactly one configuration; made if it does not exist.

    Raises:
      InputError: as `check` does, or the folder cannot be made.
    """

    def __init__(self, path: pathlib.Path, config: Any, *, operational: Sequence[str]) -> None:
        check(path, config, operational=operational)
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            files.write_text(path / _CONFIG_FILE, json.dumps(_as_json(config), indent=2) + "\n")
        except OSError as error:
            raise InputError(f"workdir {path} cannot be written: {error.strerror}") from None
        self._checkpoints = ocp.CheckpointManager(
            (path / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )

    def restore(self, state: State) -> State:
        """Return the latest checkpoint, or `state` where there is none; metrics are cut to fit."""
        step = self._checkpoints.latest_step()
        if step is not None:
            leaves = self._checkpoints.restore(
                step, args=ocp.args.StandardRestore(jax.eval_shape(_named_leaves, state))
            )
            names = _named_leaves(state)
            state = jax.tree.unflatten(jax.tree.structure(state), [leaves[n] for n in names])
        done = int(state.step)
        kept = [m for m in self.metrics() if m["step"] <= done]
        files.write_text(self.metrics_file, "".join(json.dumps(m) + "\n" for m in kept))
        return state

    def save(self, state: State) -> None:
        """Write a checkpoint; it counts only once it is complete."""
        if self._checkpoints.latest_step() != int(state.step):
            self._checkpoints.save(
                int(state.step), args=ocp.args.StandardSave(_named_leaves(state))
            )

    def metrics(self) -> list[dict[str, Any]]:
        """Read the metrics so far, without a last line that a kill cut short."""
        if not self.metrics_file.exists():
            return []
        read = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
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


def _as_json(config: Any) -> Any:
    # Through JSON, so that tuples and lists compare equal.
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _named_leaves(state: Any) -> dict[str, jax.Array]:
    """Name every array; a plain dict can be restored without the optimiser's classes."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in paths}


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names."""
    if not isinstance(values, dict | list) or not values:
        return {name: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    flat = {}
    for key, value in items:
        flat |= _flat(value, f"{name}.{key}" if name else str(key))
    return flat

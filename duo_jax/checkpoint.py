"""The converted checkpoint: what `python -m convert` writes, and how it is read.

    duo_jax.json        {"format": "duo_jax checkpoint", "version": 1}
    params/             an orbax checkpoint (zstd-compressed, OCDBT)
    config.json, ...    config, tokenizer and identify.json of the original, as they were

The tree in params/ is that of duo_jax.llama with its layers apart, so that single tensors can be
written and read: layers/self_attn/q_proj/kernel is 32 arrays, layers/0/self_attn/q_proj/kernel to
layers/31/...
"""

import contextlib
import json
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from duo_jax import tensor_info, tensor_names
from duo_jax.config import ModelConfig
from duo_jax.errors import InputError
from duo_jax.tensor_info import DTYPES, TensorInfo
from duo_jax.tensor_names import Path, Tensor

MARKER_FILE = "duo_jax.json"
PARAMS_FOLDER = "params"
FORMAT = "duo_jax checkpoint"
VERSION = 1


class CheckpointWeights:
    """Tensors of a converted checkpoint.

    Raises:
      InputError: the checkpoint is damaged, of another version, or does not fit its config.json.
    """

    def __init__(self, folder: pathlib.Path, config: ModelConfig) -> None:
        self.config = config
        self.tensors = tensor_names.tensors(config)
        self._path = folder.absolute() / PARAMS_FOLDER
        _check_marker(folder / MARKER_FILE)
        self._metadata = self._read_metadata()
        tensor_info.check(
            {"/".join(path): _info(leaf) for path, leaf in self._metadata.items()},
            {"/".join(stored_path(tensor)): tensor.shape for tensor in self.tensors},
            where=str(folder),
        )

    def dtype(self, tensor: Tensor) -> np.dtype:
        return np.dtype(self._metadata[stored_path(tensor)].dtype)

    def read(self, tensor: Tensor) -> np.ndarray:
        from orbax.checkpoint.experimental import v1 as ocp

        path = stored_path(tensor)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with quiet_orbax(), context:
                leaf = ocp.load(self._path, nested({path: self._metadata[path]}))
        except Exception as error:  # orbax and tensorstore have no common error for damaged files
            raise self._damaged(error) from None
        for key in path:
            leaf = leaf[key]
        return np.asarray(leaf)

    def _read_metadata(self) -> dict[Path, Any]:
        from orbax.checkpoint.experimental import v1 as ocp  # takes a second to import

        try:
            with quiet_orbax():
                return flattened(ocp.metadata(self._path).metadata)
        except Exception as error:  # as above
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> InputError:
        return InputError(f"{self._path} is damaged ({type(error).__name__}: {str(error)[:200]})")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silence what orbax prints about errors that it also raises.

    It logs warnings and tracebacks. And where several arrays fail at once, only one error is
    raised; asyncio reports the others whenever their tasks are collected, and Python reports
    callbacks that find the event loop closed. So after an error those two filters stay.
    """
    absl, asyncio = logging.getLogger("absl"), logging.getLogger("asyncio")
    level, report = absl.level, sys.unraisablehook

    def report_unless_late(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    absl.setLevel(logging.CRITICAL)
    asyncio.addFilter(_is_not_tensorstore)
    sys.unraisablehook = report_unless_late
    try:
        yield
        sys.unraisablehook = report
        asyncio.removeFilter(_is_not_tensorstore)
    finally:
        absl.setLevel(level)


def _is_not_tensorstore(record: logging.LogRecord) -> bool:
    return "OCDBT" not in record.getMessage()


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether a folder is a converted checkpoint."""
    return (folder / MARKER_FILE).exists()


def stored_path(tensor: Tensor) -> Path:
    """Return where a tensor is in the stored tree, such as layers/3/mlp/up_proj/kernel."""
    if tensor.layer is None:
        return tensor.path
    return (tensor.path[0], str(tensor.layer), *tensor.path[1:])


def nested(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Turn {("a", "b"): leaf} into {"a": {"b": leaf}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


def flattened(tree: dict[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """Turn {"a": {"b": leaf}} into {("a", "b"): leaf}."""
    leaves = {}
    for key, value in tree.items():
        path = (*prefix, key)
        leaves |= flattened(value, path) if isinstance(value, dict) else {path: value}
    return leaves


def _info(leaf: Any) -> TensorInfo:
    dtype = np.dtype(leaf.dtype)
    known = dtype in DTYPES.values()
    return TensorInfo(shape=leaf.shape, dtype_name=dtype.name, dtype=dtype if known else None)


def _check_marker(path: pathlib.Path) -> None:
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        found = (marker["format"], marker["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if found != (FORMAT, VERSION):
        raise InputError(
            f"{path} says {found[0]!r}, version {found[1]!r}; this duo_jax reads "
            f"{FORMAT!r}, version {VERSION}: convert the model again, or update duo_jax"
        )

"""Attention patterns: one gate per layer and KV head, in the file format of the published ones.

A pattern is a folder with `full_attention_heads.tsv` (tab-separated numbers, a row per layer, a
column per KV head) and `config.json` (sink_size, recent_size; other keys are kept). The reference
implementation and kvpress read the same folders.
"""

import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Bool, Float

from duo_jax import files
from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import argument, convert, path_argument
from duo_jax.schema.json_reader import MAX_BYTES, parse_json, read_json
from duo_jax.schema.kinds import Count, Fraction, Size

_GATES_FILE = "full_attention_heads.tsv"
_CONFIG_FILE = "config.json"
_MAX_BYTES = 4 << 20  # of a published pattern's gates: 6 KB
_MOST_GATES = 100_000  # as written, 2.6 MB; the largest published model has 1,008


class _Sizes(msgspec.Struct):
    """The sizes that every config.json has."""

    sink_size: Size
    recent_size: Count


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pattern:
    """Gates as stored, and the sizes of the streaming heads they were learned with."""

    gates: Float[np.ndarray, "layers kv_heads"]
    sink_size: int
    recent_size: int
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        argument("sink_size", self.sink_size, Size)
        argument("recent_size", self.recent_size, Count)
        _check_extra(self.extra)
        _check_gates(self.gates)

    def clipped(self) -> Float[np.ndarray, "layers kv_heads"]:
        """Return the gates in [0, 1]; stored values may lie slightly outside."""
        return np.clip(self.gates, 0.0, 1.0)


def load_pattern(folder: str | pathlib.Path) -> Pattern:
    """Read a pattern folder.

    Raises:
      InputError: a file is missing or malformed.
    """
    path_argument("pattern", folder)
    folder = pathlib.Path(folder)
    gates_file, config_file = folder / _GATES_FILE, folder / _CONFIG_FILE
    for file in (gates_file, config_file):
        if not files.present(file):
            raise InputError(
                f"{file} does not exist; a pattern folder holds {_GATES_FILE} and {_CONFIG_FILE}"
            )
    gates = _parse_gates(files.read_text(gates_file, max_bytes=_MAX_BYTES), gates_file)
    config = read_json(config_file)
    missing = [key for key in _Sizes.__struct_fields__ if key not in config]
    if missing:
        raise InputError(f"{files.shown(config_file)} lacks {', '.join(missing)}")
    sizes = convert(config, _Sizes, files.shown(config_file))
    extra = {key: value for key, value in config.items() if key not in _Sizes.__struct_fields__}
    return Pattern(
        gates=gates, sink_size=sizes.sink_size, recent_size=sizes.recent_size, extra=extra
    )


def save_pattern(pattern: Pattern, folder: str | pathlib.Path) -> None:
    """Write a pattern folder; the folder appears only when complete.

    Raises:
      InputError: it cannot be written, could not be read again, or the folder holds other files.
    """
    if not isinstance(pattern, Pattern):
        raise InputError(f"pattern {quoted(pattern)} is no Pattern")
    path_argument("folder", folder)
    pattern = dataclasses.replace(pattern)  # checked anew: what it holds may have changed since
    text = io.StringIO()
    np.savetxt(text, pattern.gates, delimiter="\t")
    sizes = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    config = json.dumps(dict(pattern.extra) | sizes, indent=2)
    if len(config) > MAX_BYTES:
        raise InputError(f"extra takes {len(config):,} bytes as JSON, more than {MAX_BYTES:,}")
    otherwise = "holds other files than a pattern's; choose another folder"
    files.check_holds_only(folder, {_GATES_FILE, _CONFIG_FILE}, otherwise)
    with files.new_folder(folder, replace=True) as partial:
        (partial / _GATES_FILE).write_text(text.getvalue(), encoding="utf-8")
        (partial / _CONFIG_FILE).write_text(config, encoding="utf-8")


def choose_retrieval_heads(
    gates: Float[np.ndarray, "layers kv_heads"], *, sparsity: float
) -> Bool[np.ndarray, "layers kv_heads"]:
    """Choose the KV heads that keep a full cache: the highest gates of the whole model.

    Of n heads exactly round(n * (1 - sparsity)) are chosen, by one ranking over all layers. Equal
    gates are ranked by layer, then by head, so the choice is deterministic.

    Args:
      gates: one value per layer and KV head; clipped to [0, 1] first.
      sparsity: fraction of streaming heads, in [0, 1].

    Raises:
      InputError: an argument is of another type, or out of range.
    """
    _check_gates(gates)
    sparsity = argument("sparsity", sparsity, Fraction)
    kept = round(gates.size * (1.0 - sparsity))
    ranking = np.argsort(-np.clip(gates, 0.0, 1.0), axis=None, kind="stable")
    chosen = np.zeros(gates.size, bool)
    chosen[ranking[:kept]] = True
    return chosen.reshape(gates.shape)


def random_heads(
    heads: Bool[np.ndarray, "layers kv_heads"], *, seed: int
) -> Bool[np.ndarray, "layers kv_heads"]:
    """Return as many retrieval heads in random places; another seed gives other places."""
    rng = np.random.default_rng([seed, heads.sum()])
    return rng.permutation(heads.ravel()).reshape(heads.shape)


def check_fits(pattern: Pattern, *, num_layers: int, num_kv_heads: int) -> None:
    """Refuse a pattern that was made for a model of another shape.

    Raises:
      InputError: the shapes differ.
    """
    if pattern.gates.shape != (num_layers, num_kv_heads):
        layers, heads = pattern.gates.shape
        raise InputError(
            f"pattern has {layers} layers x {heads} KV heads, the model has {num_layers} x "
            f"{num_kv_heads}; was it learned on another model?"
        )


def _check_gates(gates: Any) -> None:
    if (
        not isinstance(gates, np.ndarray)
        or gates.ndim != 2
        or not 1 <= gates.size <= _MOST_GATES
        or gates.dtype.kind not in "biuf"
        or not np.isfinite(gates).all()
    ):
        shape = f" of shape {gates.shape}" if isinstance(gates, np.ndarray) else ""
        raise InputError(
            f"gates {quoted(gates)}{shape} are no numpy array of 1 to {_MOST_GATES:,} finite "
            "numbers, layers x KV heads"
        )


def _check_extra(extra: Any) -> None:
    """Refuse what config.json could not hold, or what could not be read there again."""
    if not isinstance(extra, Mapping) or not all(isinstance(name, str) for name in extra):
        raise InputError(f"extra {quoted(extra)} is no mapping of names to values")
    sizes = [name for name in _Sizes.__struct_fields__ if name in extra]
    if sizes:
        raise InputError(f"extra names {', '.join(sizes)}, of which the pattern has its own")
    try:
        "".join(extra).encode()  # no half characters; a model's name in the values may have some
        text = json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"extra {quoted(extra)} cannot be written as JSON: {error}") from None
    parse_json(text, "extra")


def _parse_gates(text: str, file: pathlib.Path) -> Float[np.ndarray, "layers kv_heads"]:
    rows = [row for row in text.split("\n") if row.strip()]
    if not rows:
        raise InputError(f"{file} holds no numbers")
    columns = rows[0].count("\t")
    for number, row in enumerate(rows, start=1):
        if row.count("\t") != columns:
            raise InputError(
                f"{file}: row {number} has {row.count(chr(9)) + 1} values, row 1 has {columns + 1}"
            )
    try:
        if not text.replace("\t", "").replace("\n", "").isprintable():
            raise ValueError("there are control characters in it")  # numpy takes some for spaces
        gates = np.loadtxt(rows, delimiter="\t", ndmin=2, comments=None)
    except ValueError as error:
        raise InputError(f"{file} is not a table of tab-separated numbers: {error}") from None
    if not np.isfinite(gates).all():
        raise InputError(f"{file} holds values that are not finite")
    if gates.size > _MOST_GATES:
        raise InputError(f"{file} holds {gates.size:,} gates, more than {_MOST_GATES:,}")
    return gates

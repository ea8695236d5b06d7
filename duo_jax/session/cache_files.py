"""Caches on disk: a folder that restores a session, so its text need not be read again.

    cache.json                the model and settings it belongs to, and the lengths of its rows
    tokens.safetensors        "0", "1", ...: the tokens of each row
    logits.safetensors        "logits" [batch, vocab]: logits after the first logits_at tokens
    layer-00000.safetensors   "full.keys", "full.values", "streaming.keys", "streaming.values"
                              [batch, kv_heads, slots, head_dim]; quantised caches are stored as
                              they are: "full.keys.words", "full.keys.scales", "full.latest.keys"

Only filled slots are stored. Host memory peaks at one layer.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from duo_jax import files
from duo_jax.cache import KVCache, LayerCache
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.schema.json_reader import read_json
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session, Snapshot

FORMAT, VERSION = "duo_jax cache", 2
_MARKER = "cache.json"


def save(session: Session, folder: str | pathlib.Path, *, extra: dict[str, Any]) -> None:
    """Write a session's tokens and cache; the folder appears only when complete.

    Args:
      session: has read something.
      folder: does not exist, or is empty.
      extra: anything JSON can hold, kept with the cache.

    Raises:
      InputError: there is nothing to save, or the folder cannot be written.
    """
    snapshot = session.snapshot()
    lengths = np.asarray(snapshot.cache.lengths)
    longest = int(lengths.max())
    marker = {
        "format": FORMAT,
        "version": VERSION,
        **_belongs_to(session.runtime),
        "lengths": lengths.tolist(),
        "logits_at": snapshot.logits_at,
        "extra": extra,
    }
    with files.new_folder(folder) as partial:
        for number, layer in enumerate(snapshot.cache.layers):
            save_file(_to_arrays(layer, longest), partial / _layer_file(number))
        save_file({"logits": np.asarray(snapshot.logits)}, partial / "logits.safetensors")
        tokens = {str(i): np.array(row, np.int32) for i, row in enumerate(snapshot.tokens)}
        save_file(tokens, partial / "tokens.safetensors")
        (partial / _MARKER).write_text(json.dumps(marker, indent=2))


def load(session: Session, folder: str | pathlib.Path) -> dict[str, Any]:
    """Load a saved cache into a new session, and return what was kept with it.

    Raises:
      InputError: the folder holds no cache, is damaged, or belongs to another model, pattern,
        dtype or version.
    """
    folder = pathlib.Path(folder)
    marker = _read_marker(folder)
    runtime = session.runtime
    for key, mine in _belongs_to(runtime).items():
        if marker[key] != mine:
            raise InputError(
                f"{folder} was saved with another {_DESCRIPTIONS[key]}"
                f"{_difference(marker[key], mine)}; read the text again"
            )
    lengths, logits_at = marker["lengths"], marker["logits_at"]
    if len(lengths) != session.batch_size:
        raise InputError(f"{folder} holds {len(lengths)} rows, not {session.batch_size}")
    with _damage(folder):
        tokens = load_file(folder / "tokens.safetensors")
        rows = [tokens[str(i)].tolist() for i in range(len(lengths))]
        for n, at, row in zip(lengths, logits_at, rows, strict=True):
            if not (0 < n <= len(row) and 0 <= at <= len(row)):
                raise ValueError(f"{lengths=} and {logits_at=} do not fit the tokens")
    empty = session.empty_cache(rows)
    layers = []
    with _damage(folder):
        for number, layer in enumerate(empty.layers):
            arrays = load_file(folder / _layer_file(number))
            layers.append(_from_arrays(layer, arrays, longest=max(lengths)))
        logits = load_file(folder / "logits.safetensors")["logits"]
        expected = (session.batch_size, runtime.config.architecture.vocab_size)
        if logits.shape != expected:
            raise ValueError(f"logits are {logits.shape}, not {expected}")
    session.restore(
        Snapshot(
            tokens=rows,
            cache=dataclasses.replace(
                empty, layers=tuple(layers), lengths=jnp.array(lengths, jnp.int32)
            ),
            logits=jnp.asarray(logits),
            logits_at=logits_at,
        )
    )
    return marker["extra"]


_DESCRIPTIONS = {
    "weights": "model or choice of retrieval heads (their values differ)",
    "model": "model",
    "retrieval_heads": "pattern or sparsity",
    "sink_size": "sink size",
    "recent_size": "recent size",
    "dtype": "dtype",
    "kv": "KV format",
    "prefill_mode": "prefill mode",
}


def _belongs_to(runtime: Runtime) -> dict[str, Any]:
    """Describe everything a cache depends on, coarsest first."""
    return {
        "model": _architecture(runtime.config.architecture),
        "dtype": runtime.dtype.name,
        "kv": runtime.kv_format,
        "sink_size": runtime.config.sink_size,
        "recent_size": runtime.config.recent_size,
        "retrieval_heads": list(runtime.config.retrieval_counts),
        "prefill_mode": runtime.prefill_mode,
        "weights": runtime.weights_digest,
    }


def _architecture(architecture: ModelConfig) -> dict[str, Any]:
    """Describe a model in the words of format version 2."""
    words = dataclasses.asdict(architecture)
    words["max_length"] = words.pop("max_positions")
    words["rope"]["original_max_length"] = words["rope"].pop("original_max_positions")
    return words


def _difference(theirs: Any, mine: Any) -> str:
    return f" ({theirs}, here {mine})" if isinstance(mine, int) or len(mine) < 12 else ""


def _read_marker(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / _MARKER
    if not files.exists(file):
        raise InputError(f"{folder} is no saved cache: there is no {_MARKER} in it")
    marker = read_json(file)
    found = (marker.get("format"), marker.get("version"))
    if found != (FORMAT, VERSION):
        raise InputError(
            f"{file} says {found[0]!r}, version {found[1]!r}; this duo_jax reads {FORMAT!r}, "
            f"version {VERSION}: read the text again"
        )
    missing = {*_DESCRIPTIONS, "lengths", "logits_at", "extra"} - set(marker)
    if missing:
        raise InputError(f"{file} lacks {', '.join(sorted(missing))}")
    for key in ("lengths", "logits_at"):
        if not isinstance(marker[key], list) or any(type(n) is not int for n in marker[key]):
            raise InputError(f"{key} is {marker[key]!r} in {file}, not a list of whole numbers")
    if not isinstance(marker["extra"], dict):
        raise InputError(f"extra is no JSON object in {file}")
    return marker


@contextlib.contextmanager
def _damage(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{folder} is damaged: {error.filename} is missing") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{folder} is damaged ({type(error).__name__}: {error})") from None


def _layer_file(number: int) -> str:
    return f"layer-{number:05d}.safetensors"


def _to_arrays(layer: LayerCache, longest: int) -> dict[str, np.ndarray]:
    """Name a layer's filled slots; safetensors wants contiguous arrays."""
    arrays = {}
    for kind, parts in _parts(layer).items():
        for name, leaf in _leaves(parts[0]).items():
            filled = _filled(name, leaf, parts[0], longest)
            leaves = (_leaves(part)[name][:, :, :filled] for part in parts)
            arrays[f"{kind}.{name}"] = np.concatenate(list(map(np.asarray, leaves)), axis=1)
    return arrays


def _leaves(cache: KVCache) -> dict[str, jax.Array]:
    """Return the buffers of a cache by name, such as "keys" or "keys.words"."""
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {".".join(key.name for key in path): leaf for path, leaf in leaves}


def _filled(name: str, leaf: jax.Array, cache: KVCache, longest: int) -> int:
    """Return how many slots of a buffer `longest` tokens fill; a slot may hold several tokens."""
    if name.startswith("latest.") and cache.latest is not None:
        cache = cache.latest
    slots = cache.slots
    return -(-min(longest, slots) * leaf.shape[2] // slots)


def _parts(layer: LayerCache) -> dict[str, tuple[KVCache, ...]]:
    """Return a layer's caches by kind of head; a file joins those of one kind."""
    streaming = () if layer.streaming is None else (layer.streaming,)
    parts = {"full": layer.full, "streaming": streaming}
    return {kind: caches for kind, caches in parts.items() if caches}


def _from_arrays(layer: LayerCache, arrays: dict[str, np.ndarray], *, longest: int) -> LayerCache:
    """Copy stored arrays, which hold `longest` tokens, into an empty layer's buffers."""

    def fill(kind: str, parts: tuple[KVCache, ...]) -> Iterator[KVCache]:
        first, num_heads = 0, sum(part.keys.shape[1] for part in parts)
        for part in parts:
            end, leaves = first + part.keys.shape[1], []
            for name, leaf in _leaves(part).items():
                array = arrays[f"{kind}.{name}"]
                slots = _filled(name, leaf, part, longest)
                if (
                    array.shape != (leaf.shape[0], num_heads, slots, leaf.shape[3])
                    or array.dtype != leaf.dtype
                ):
                    raise ValueError(f"{kind}.{name} is {array.dtype} {array.shape}")
                stored = array[:, first:end]
                leaves.append(jax.lax.dynamic_update_slice(leaf, stored, (0, 0, 0, 0)))
            yield jax.tree.unflatten(jax.tree.structure(part), leaves)
            first = end

    filled = {kind: tuple(fill(kind, parts)) for kind, parts in _parts(layer).items()}
    [streaming] = filled.get("streaming", (None,))
    return LayerCache(full=filled.get("full", ()), streaming=streaming)

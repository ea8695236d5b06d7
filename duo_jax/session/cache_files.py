"""Caches on disk: a folder that restores a session, so its text need not be read again.

    cache.json                the model and settings it belongs to, the lengths of its rows, the
                              checksums of the other files, and its own
    tokens.safetensors        "0", "1", ...: the tokens of each row
    logits.safetensors        "logits" [batch, vocab]: logits after the first logits_at tokens
    layer-00000.safetensors   "full.keys", "full.values", "streaming.keys", "streaming.values"
                              [batch, kv_heads, slots, head_dim]; quantised caches are stored as
                              they are: "full.keys.words", "full.keys.scales", "full.latest.keys"

Only filled slots are stored. Host memory peaks at one layer.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from duo_jax import files
from duo_jax.cache import KVCache, LayerCache, stripes
from duo_jax.errors import InputError, quoted
from duo_jax.mesh.devices import AnyMesh
from duo_jax.model.config import ModelConfig
from duo_jax.schema import checksums
from duo_jax.schema.check import convert
from duo_jax.schema.json_reader import MAX_BYTES, parse_json
from duo_jax.schema.kinds import Count, Size
from duo_jax.session import stored_arrays
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session, Snapshot
from duo_jax.session.stored_arrays import Expected, StoredArrays

FORMAT, VERSION = "duo_jax cache", 3
_MOST_KEPT = MAX_BYTES - (1 << 20)  # the rest of cache.json is for the other entries
_MARKER, _TOKENS, _LOGITS = "cache.json", "tokens.safetensors", "logits.safetensors"


class _Marker(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What cache.json holds, beside its checksum."""

    format: str
    version: int
    model: dict[str, Any]
    dtype: str
    kv: str
    sink_size: Size
    recent_size: Size
    retrieval_heads: list[Size]
    prefill_mode: str
    weights: str
    lengths: list[Count]
    # Where tokens were evicted:
    kept: list[Size] | None = None  # tokens that full caches hold, per row
    keep: float = 1.0
    keep_by: str = "snapkv"
    logits_at: list[Count]
    extra: dict[str, Any]
    files: dict[str, str]  # their checksums


def save(session: Session, folder: str | pathlib.Path, *, extra: dict[str, Any]) -> None:
    """Write a session's tokens and cache; the folder appears only when complete.

    Args:
      session: has read something.
      folder: does not exist, or is empty.
      extra: anything JSON can hold, kept with the cache.

    Raises:
      InputError: there is nothing to save, a number is not finite, or the folder cannot be
        written.
    """
    snapshot = session.snapshot()
    lengths = np.asarray(snapshot.cache.lengths)
    if not _fit(lengths.tolist(), snapshot.logits_at, snapshot.tokens):
        raise InputError("nothing has been read yet: there is no cache to save")
    _check_kept(extra)
    marker = {
        "format": FORMAT,
        "version": VERSION,
        **_belongs_to(session.runtime),
        "lengths": lengths.tolist(),
        "logits_at": snapshot.logits_at,
        "extra": extra,
    }
    kept = np.asarray(snapshot.cache.kept)
    if session.runtime.keep == 1:  # as before there was eviction
        del marker["keep"], marker["keep_by"]
    else:
        marker["kept"] = kept.tolist()
    filled = {"full": int(kept.max()), "streaming": int(lengths.max())}
    if jax.process_index() > 0:  # the first process writes what all of them gather
        for layer in snapshot.cache.layers:
            _to_arrays(layer, filled, snapshot.cache.mesh)
        return
    with files.new_folder(folder) as partial:
        found = marker["files"] = {}
        for number, layer in enumerate(snapshot.cache.layers):
            name = _layer_file(number)
            arrays = _to_arrays(layer, filled, snapshot.cache.mesh)
            found[name] = stored_arrays.save(arrays, partial / name)
        logits = {"logits": np.asarray(snapshot.logits)}
        found[_LOGITS] = stored_arrays.save(logits, partial / _LOGITS)
        tokens = {str(i): np.array(row, np.int32) for i, row in enumerate(snapshot.tokens)}
        found[_TOKENS] = stored_arrays.save(tokens, partial / _TOKENS)
        (partial / _MARKER).write_text(checksums.seal(marker) + "\n", encoding="utf-8")


def _check_kept(extra: dict[str, Any]) -> None:
    """Refuse what could not be read again, before anything is written."""
    text = json.dumps({"extra": extra})
    if len(text) > _MOST_KEPT:
        raise InputError(f"the chat has {len(text):,} bytes as JSON; {_MOST_KEPT:,} can be saved")
    parse_json(text, "the chat")


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
        theirs = getattr(marker, key)
        if theirs != mine:
            raise InputError(
                f"{folder} was saved with another {_DESCRIPTIONS[key]}"
                f"{_difference(theirs, mine)}; read the text again"
            )
    if len(marker.lengths) != session.batch_size:
        raise InputError(f"{folder} holds {len(marker.lengths)} rows, not {session.batch_size}")

    def opened(name: str, expected: Expected) -> Callable[[], dict[str, np.ndarray]]:
        if name not in marker.files:
            raise InputError(f"{folder / _MARKER} has no checksum of {name}")
        return functools.partial(StoredArrays(folder / name, expected).read, marker.files[name])

    names = [str(i) for i in range(session.batch_size)]
    tokens = opened(_TOKENS, dict.fromkeys(names, ((None,), np.dtype(np.int32))))()
    rows = [tokens[name].tolist() for name in names]
    if not _fit(marker.lengths, marker.logits_at, rows):
        raise InputError(f"{folder / _MARKER}: lengths and logits_at do not fit the tokens")
    kept = marker.lengths if marker.kept is None else marker.kept
    if len(kept) != len(rows) or any(k > n for k, n in zip(kept, marker.lengths, strict=True)):
        raise InputError(f"{folder / _MARKER}: kept does not fit the lengths")
    # All that the files claim to hold is looked at before memory is taken for it.
    make_empty = functools.partial(session.empty_cache, rows, kept=max(kept))
    filled = {"full": max(kept), "streaming": max(marker.lengths)}
    shapes = jax.eval_shape(make_empty)
    arrays_of = [
        opened(_layer_file(number), _expected(layer, filled))
        for number, layer in enumerate(shapes.layers)
    ]
    shape = (session.batch_size, runtime.config.architecture.vocab_size)
    read_logits = opened(_LOGITS, {"logits": (shape, None)})
    empty = make_empty()
    layers = (
        _from_arrays(layer, read(), empty.mesh)
        for layer, read in zip(empty.layers, arrays_of, strict=True)
    )
    session.restore(
        Snapshot(
            tokens=rows,
            cache=dataclasses.replace(
                empty,
                layers=tuple(layers),
                lengths=empty.lengths + np.array(marker.lengths, np.int32),  # where those lie
                kept=empty.kept + np.array(kept, np.int32),
            ),
            logits=jnp.array(read_logits()["logits"]),
            logits_at=marker.logits_at,
        )
    )
    return marker.extra


def _fit(lengths: Sequence[int], logits_at: Sequence[int], rows: Sequence[Sequence[int]]) -> bool:
    """Whether each row holds the tokens before its logits, and the cache holds no fewer."""
    return len(lengths) == len(logits_at) == len(rows) and all(
        0 < at <= held <= len(row) for held, at, row in zip(lengths, logits_at, rows, strict=True)
    )


_DESCRIPTIONS = {
    "weights": "model or choice of retrieval heads (their values differ)",
    "model": "model",
    "retrieval_heads": "pattern or sparsity",
    "sink_size": "sink size",
    "recent_size": "recent size",
    "dtype": "dtype",
    "kv": "KV format",
    "prefill_mode": "prefill mode",
    "keep": "fraction of tokens to keep",
    "keep_by": "choice of tokens to keep",
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
        "keep": runtime.keep,
        "keep_by": runtime.keep_by if runtime.keep < 1 else "snapkv",
        "weights": runtime.weights_digest,
    }


def _architecture(architecture: ModelConfig) -> dict[str, Any]:
    """Describe a model in the words of format version 2."""
    words = dataclasses.asdict(architecture)
    words["max_length"] = words.pop("max_positions")
    words["rope"]["original_max_length"] = words["rope"].pop("original_max_positions")
    return words


def _difference(theirs: Any, mine: Any) -> str:
    return f" ({theirs}, here {mine})" if isinstance(mine, int | float) or len(mine) < 12 else ""


def _read_marker(folder: pathlib.Path) -> _Marker:
    file = folder / _MARKER
    if not files.exists(file):
        raise InputError(f"{folder} is no saved cache: there is no {_MARKER} in it")
    values, undamaged = checksums.read_sealed(file)
    found = (values.get("format"), values.get("version"))
    if found != (FORMAT, VERSION):
        raise InputError(
            f"{file} says {quoted(found[0])}, version {quoted(found[1])}; this duo_jax reads "
            f"{FORMAT!r}, version {VERSION}: read the text again"
        )
    if not undamaged:
        raise InputError(f"{file} is damaged: its checksum is another")
    return convert(values, _Marker, str(file))


def _layer_file(number: int) -> str:
    return f"layer-{number:05d}.safetensors"


def _to_arrays(
    layer: LayerCache, tokens: dict[str, int], mesh: AnyMesh | None
) -> dict[str, np.ndarray]:
    """Name a layer's filled slots; safetensors wants contiguous arrays.

    `tokens` says how many tokens caches of a kind hold, or could hold.
    """
    arrays = {}
    for kind, parts in _parts(layer).items():
        for name, leaf in _leaves(parts[0]).items():
            filled = _filled(name, leaf, parts[0], tokens[kind])
            cut = mesh if _is_cut(kind, name) else None
            leaves = [
                stripes.to_host(_leaves(part)[name], filled, cut, _tokens_per_slot(leaf, part))
                for part in parts
            ]
            arrays[f"{kind}.{name}"] = np.concatenate(leaves, axis=1)
    return arrays


def _leaves(cache: KVCache) -> dict[str, Any]:
    """Return the buffers of a cache by name, such as "keys" or "keys.words"."""
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {".".join(key.name for key in path): leaf for path, leaf in leaves}


def _expected(layer: LayerCache, tokens: dict[str, int]) -> Expected:
    """Return what the file of a layer holds, by the shapes of an empty one."""
    found = {}
    for kind, parts in _parts(layer).items():
        num_heads = sum(part.keys.shape[1] for part in parts)
        for name, leaf in _leaves(parts[0]).items():
            slots = _filled(name, leaf, parts[0], tokens[kind])
            shape = (leaf.shape[0], num_heads, slots, leaf.shape[3])
            found[f"{kind}.{name}"] = (shape, np.dtype(leaf.dtype))
    return found


def _filled(name: str, leaf: Any, cache: KVCache, tokens: int) -> int:
    """Return how many slots of a buffer some tokens fill; a slot may hold several tokens."""
    if name.startswith("latest.") and cache.latest is not None:
        cache = cache.latest
    slots = cache.slots
    return -(-min(tokens, slots) * leaf.shape[2] // slots)


def _is_cut(kind: str, name: str) -> bool:
    """Return whether devices have parts of a buffer; rings they have whole."""
    return kind == "full" and not name.startswith("latest.")


def _tokens_per_slot(leaf: Any, cache: KVCache) -> int:
    return cache.slots // leaf.shape[2]


def _parts(layer: LayerCache) -> dict[str, tuple[KVCache, ...]]:
    """Return a layer's caches by kind of head; a file joins those of one kind."""
    streaming = () if layer.streaming is None else (layer.streaming,)
    parts = {"full": layer.full, "streaming": streaming}
    return {kind: caches for kind, caches in parts.items() if caches}


@functools.partial(jax.jit, donate_argnums=0)
def _written(buffer: jax.Array, stored: jax.Array) -> jax.Array:
    """Write into a buffer in place; nothing is copied twice."""
    return jax.lax.dynamic_update_slice(buffer, stored, (0, 0, 0, 0))


def _from_arrays(
    layer: LayerCache, arrays: dict[str, np.ndarray], mesh: AnyMesh | None
) -> LayerCache:
    """Return an empty layer, which is used up, with stored arrays in its buffers."""

    def fill(kind: str, parts: tuple[KVCache, ...]) -> Iterator[KVCache]:
        first = 0
        for part in parts:
            end, leaves = first + part.keys.shape[1], []
            for name, leaf in _leaves(part).items():
                stored = arrays[f"{kind}.{name}"][:, first:end]
                if mesh is not None and _is_cut(kind, name):
                    tokens = _tokens_per_slot(leaf, part)
                    leaves.append(stripes.from_host(leaf, stored, mesh, tokens))
                else:
                    leaves.append(_written(leaf, stored))
            yield jax.tree.unflatten(jax.tree.structure(part), leaves)
            first = end

    filled = {kind: tuple(fill(kind, parts)) for kind, parts in _parts(layer).items()}
    [streaming] = filled.get("streaming", (None,))
    return LayerCache(full=filled.get("full", ()), streaming=streaming)

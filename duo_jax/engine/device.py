"""What an engine has on its device: pools of pages, rings, histories; and its few programs.

Rows for requests come first in the rings, rows for snapshots after them. Everything is allocated
once; programs update it in place.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from duo_jax.cache import Cache, device_bytes, init_cache, pages, stripes
from duo_jax.engine.request import MOST_LOGPROBS
from duo_jax.mesh.devices import AnyMesh
from duo_jax.serve import row_sampling, rows
from duo_jax.serve.row_sampling import RowHistory, RowSettings, Sampled
from duo_jax.session import memory
from duo_jax.session.runtime import Runtime

PromptScores = tuple[
    Float[np.ndarray, "length"], Float[np.ndarray, "length most"], Int[np.ndarray, "length most"]
]


@functools.partial(jax.jit, donate_argnames="layers", static_argnames="mesh")
def _adopt(
    layers: pages.Layers,
    dense: pages.Layers,
    numbers: Int[Array, " pages"],
    row: Int[Array, ""],
    *,
    mesh: AnyMesh | None,
) -> pages.Layers:
    """Copy a text's own cache into pages; of several devices each copies what it holds."""
    if mesh is None:
        return pages.adopt(layers, dense, numbers, row)
    everywhere, specs = PartitionSpec(), stripes.specs(layers)
    in_specs = (specs, stripes.specs(dense), everywhere, everywhere)
    some = jax.shard_map(
        pages.adopt, mesh=mesh, in_specs=in_specs, out_specs=specs, check_vma=False
    )
    return some(layers, dense, numbers, row)


class Device:
    """Arrays of an engine.

    Args:
      runtime: the model.
      rows: rows for requests.
      snapshots: rows for snapshots of rings.
      num_pages: pages of every pool.
      page_size: tokens of a page.
      max_len: tokens of a request.

    Raises:
      InputError: there is too little memory.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        rows: int,
        snapshots: int,
        num_pages: int,
        page_size: int,
        max_len: int,
    ) -> None:
        self._runtime, self._rows = runtime, rows
        self._sizes = {
            "batch_size": rows + snapshots,
            "max_len": max_len,
            "dtype": runtime.dtype,
            "kv": runtime.kv_format,
            "num_pages": num_pages,
            "page_size": page_size,
            "mesh": runtime.mesh,
        }
        self.vocab_size = runtime.config.architecture.vocab_size
        self._most = min(MOST_LOGPROBS, self.vocab_size)
        self._options = {"implementation": runtime.implementation, "mesh": runtime.mesh}
        self.everything_allowed = np.full(-(-self.vocab_size // 32), -1, np.int32)
        self.clear()

    def clear(self) -> None:
        """Begin with empty caches, whatever became of those before."""
        self._layers = self._history = None  # freed before others are allocated
        with memory.for_cache(device_bytes(self._runtime.config, **self._sizes)):
            cache = init_cache(self._runtime.config, **self._sizes)
            self._layers = jax.block_until_ready(cache.layers)
        self._history = RowHistory.empty(self._rows, self.vocab_size)

    def prefill(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        width: int,
        start: int,
        total: int,
        table: Int32[np.ndarray, " most_pages"],
        targets: Sequence[int] | None = None,
    ) -> tuple[Float[Array, "1 vocab"], PromptScores | None]:
        """Read a chunk of a prompt into a row.

        Args:
          row: the row.
          tokens: the chunk.
          width: what it is padded to.
          start: tokens before it.
          total: tokens of the prompt.
          table: the row's pages.
          targets: the token that follows each of the chunk's, to be scored.

        Returns:
          Logits after the chunk, and the scores of the targets.
        """
        arguments = (
            self._runtime.config,
            self._runtime.params,
            self._layers,
            np.int32(row),
            _padded(tokens, width),
            *(np.array([n], np.int32) for n in (len(tokens), start, total)),
            table[None].copy(),  # it may be written to before the program has run
        )
        if targets is None:
            logits, self._layers = rows.prefill_row(*arguments, **self._options)
            return logits, None
        follow = _padded(targets, width)
        logits, scores, self._layers = rows.prefill_row_scored(
            *arguments, follow, most=self._most, **self._options
        )
        logprobs, top, which = (np.asarray(x)[: len(targets)] for x in scores)
        return logits, (logprobs, top, which)

    def decode(
        self,
        tokens: Int32[np.ndarray, " batch"],
        lengths: Int32[np.ndarray, " batch"],
        active: Bool[np.ndarray, " batch"],
        table: Int32[np.ndarray, "batch most_pages"],
    ) -> Float[Array, "batch vocab"]:
        """Append a token to the first rows, where they are active; return the logits."""
        logits, self._layers = rows.decode_rows(
            self._runtime.config,
            self._runtime.params,
            self._layers,
            tokens,
            lengths,
            active,
            table.copy(),
            **self._options,
        )
        return logits

    def sample(
        self,
        logits: Float[Array, "batch vocab"],
        first: int,
        settings: RowSettings,
        active: Bool[np.ndarray, " batch"],
        allowed: Int32[np.ndarray, "batch words"],
    ) -> Sampled:
        """Draw the next tokens of some rows, from `first` on; returns numpy arrays."""
        sampled, self._history = row_sampling.sample_rows(
            logits, self._history, np.int32(first), settings, active, allowed, most=self._most
        )
        return jax.tree.map(np.asarray, sampled)

    def begin_history(
        self, row: int, seen: Sequence[int], written: Sequence[int], bias: dict[int, float]
    ) -> None:
        """Give a row the history of a request.

        Args:
          row: the row.
          seen: tokens of prompt and answer.
          written: tokens of the answer.
          bias: of some tokens' logits.
        """
        new = jax.tree.map(lambda x: np.zeros((1, self.vocab_size), x.dtype), self._history)
        new.seen[0, list(seen)] = True
        np.add.at(new.written[0], list(written), 1)
        new.bias[0, list(bias)] = list(bias.values())
        self._history = row_sampling.begin_row(self._history, np.int32(row), new)

    def copy_row(self, source: int, target: int, *, history: bool = False) -> None:
        """Copy the rings of a row over those of another; with them its history."""
        self._layers = rows.copy_row(self._layers, np.int32(source), np.int32(target))
        if history:
            places = (np.int32(source), np.int32(target))
            self._history = row_sampling.move_row(self._history, *places)

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page over another."""
        self._layers = rows.copy_page(self._layers, np.int32(source), np.int32(target))

    def clear_text(self, numbers: Sequence[int], row: int) -> None:
        """Write zeros into pages, and into the rings of a row."""
        self._layers = rows.clear_row(self._layers, np.int32(row))
        for number in numbers:
            self._layers = rows.clear_page(self._layers, np.int32(number))

    def adopt(self, cache: Cache, numbers: Sequence[int], row: int) -> None:
        """Copy a text's own cache into pages and a row."""
        places = (np.asarray(numbers, np.int32), np.int32(row))
        self._layers = _adopt(self._layers, cache.layers, *places, mesh=self._runtime.mesh)


def _padded(tokens: Sequence[int], width: int) -> Int32[np.ndarray, "1 length"]:
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded

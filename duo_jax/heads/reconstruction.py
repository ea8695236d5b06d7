"""The reconstruction score of KVzip: what a model looks at while it repeats a text.

Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv
2505.23416, sections 3.2 and 3.4; public code https://github.com/snu-mllab/KVzip. After a text comes
an instruction to repeat it, and then the text once more (teacher forcing). With a[i, t, j] the
attention of query head i from token t of this second reading to token j of the first:

    score of key j in KV head k = max over the query heads i of k, max over t of a[i, t, j]
    score of KV head k          = max over j; then the mean over texts

Texts are repeated in chunks of 2,048 tokens (the public code: 2,000), each after the whole text and
an instruction of its own, which names the last 8 tokens of the chunk before. As there, the softmax
runs over the first 4 tokens, the chunk and the repetition alone: time and memory grow with the
length, not its square. Where the model's range ends soon, chunks are shorter.

Of the attention a streaming head keeps a part: to the sinks and the latest tokens. With `sink_size`
and `recent_size` that part does not count (it stays in the softmax). That is ours, for scores of
heads: the public code counts the latest tokens, which any head that looks at the token before it
sees at the start of the instruction, and has the model's system prompt where our sinks are.

No system prompt and no chat template: text, instruction, line break, text.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from duo_jax.model import llama, rope
from duo_jax.model.config import ModelConfig
from duo_jax.model.layers import Residual
from kernels import Implementation, masks, prefill_attention
from kernels.by_heads import by_heads
from kernels.precision import accumulator

_WHOLE = "\n\nRepeat the previous context exactly."
_PART = "\n\nRepeat the part of the previous context exactly, starting with"
_CHUNK = 2048  # tokens that are repeated at a time
_LEAST = 64  # of them, even if that leaves the model's range
_NAMED = 8  # tokens before a chunk that its instruction names
_SINKS = 4  # first tokens, in every softmax
_BLOCK = 64  # queries whose scores exist at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """What stands between a text and its repetition, in tokens."""

    whole: tuple[int, ...]  # before the first chunk
    part: tuple[int, ...]  # before the others; then come the last tokens of the chunk before
    begin: tuple[int, ...]  # then the repetition begins

    @classmethod
    def of(cls, encode: Callable[[str], Sequence[int]]) -> "Instruction":
        """Return the instruction of a tokenizer.

        Args:
          encode: returns the tokens of a text that continues another.
        """
        return cls(whole=tuple(encode(_WHOLE)), part=tuple(encode(_PART)), begin=(*encode("\n"),))

    def before(self, text: Sequence[int], start: int) -> list[int]:
        """Return the instruction to repeat a text from its token `start` on."""
        told = [*self.part, *text[max(0, start - _NAMED) : start]] if start else self.whole
        return [*told, *self.begin]

    @property
    def longest(self) -> int:
        """Tokens of the longest instruction."""
        return max(len(self.whole), len(self.part) + _NAMED) + len(self.begin)


def head_scores(
    scores: Float[np.ndarray, "layers kv_heads length"],
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return the score of each head from those of its keys."""
    return np.clip(scores.max(axis=-1), 0.0, 1.0)  # rounding may carry attention beyond 1


def key_scores(
    architecture: ModelConfig,
    params: llama.Params,
    tokens: Int[np.ndarray, "batch length"],
    lengths: Int[np.ndarray, " batch"],
    *,
    instruction: Instruction,
    sink_size: int = 0,
    recent_size: int = 0,
    chunk: int | None = None,
    implementation: Implementation = "auto",
) -> Float[np.ndarray, "layers batch kv_heads length"]:
    """Return the score of every key; 0 for padding.

    Layer by layer: no more than one layer's keys and values exist at a time.

    Args:
      architecture: the model.
      params: its parameters, stacked or in serving form with heads in their own order.
      tokens: texts, a row each; row b counts up to lengths[b].
      lengths: tokens per row, at least 1.
      instruction: what stands between a text and its repetition.
      sink_size: first tokens to which attention does not count.
      recent_size: latest tokens before a query, its own included, to which it does not count.
      chunk: tokens that are repeated at a time; default: see the module's docstring.
      implementation: attention implementation, see kernels.dispatch.
    """
    length = tokens.shape[1]
    chunk = chunk or _chunk_size(architecture, length, instruction)
    starts = range(0, length, chunk)
    padded = np.pad(tokens, ((0, 0), (0, len(starts) * chunk - length)))
    repetitions = [
        _repetition(padded, lengths, start, chunk=chunk, instruction=instruction)
        for start in starts
    ]
    embedding, before = params["embed_tokens"]["embedding"], jnp.asarray(lengths)
    positions = jnp.broadcast_to(jnp.arange(padded.shape[1]), padded.shape)
    cos_sin = rope.rotation(architecture, positions, total_length=before)
    x = embedding[padded]
    streams = [embedding[repeated] for repeated, _ in repetitions]
    options = {"architecture": architecture, "implementation": implementation}
    sizes = {"chunk": chunk, "sink_size": sink_size, "recent_size": recent_size}
    scores = []
    for layer in _layers(params, architecture.num_layers):
        x, keys, values = _read_layer(layer, x, cos_sin, **options)
        of_layer = []
        for index, (start, (_, counts)) in enumerate(zip(starts, repetitions, strict=True)):
            place = (before, jnp.asarray(counts), jnp.array(start))
            streams[index], largest = _repeat_layer(
                layer, streams[index], keys, values, *place, **options, **sizes
            )
            of_layer.append(np.asarray(largest))
        scores.append(np.concatenate(of_layer, axis=-1)[..., :length])
    return np.stack(scores)


def _chunk_size(architecture: ModelConfig, length: int, instruction: Instruction) -> int:
    room = architecture.max_positions - length - instruction.longest
    return min(max(room // _BLOCK * _BLOCK, _LEAST), _CHUNK, length)


def _repetition(
    padded: Int[np.ndarray, "batch length"],
    lengths: Int[np.ndarray, " batch"],
    start: int,
    *,
    chunk: int,
    instruction: Instruction,
) -> tuple[Int[np.ndarray, "batch width"], Int[np.ndarray, " batch"]]:
    """Return instruction and chunk of every row, and how many tokens of it count."""
    rows = []
    for row, length in zip(padded.tolist(), lengths.tolist(), strict=True):
        repeated = row[start : max(start, min(start + chunk, length))]
        told = instruction.before(row, start)
        rows.append([*told, *repeated] if repeated else [])
    counts = np.array([len(row) for row in rows], np.int32)
    width = -(-(instruction.longest + chunk) // _BLOCK) * _BLOCK
    filled = [np.pad(np.asarray(row, np.int32), (0, width - len(row))) for row in rows]
    return np.stack(filled), counts


def _layers(params: llama.Params, number: int) -> Iterator[Any]:
    layers = params["layers"]
    if isinstance(layers, tuple):
        yield from layers
        return
    for index in range(number):
        yield jax.tree.map(lambda leaf, i=index: leaf[i], layers)


@functools.partial(jax.jit, static_argnames=("architecture", "implementation"))
def _read_layer(
    layer: llama.Params,
    x: Residual,
    cos_sin: rope.CosSin,
    *,
    architecture: ModelConfig,
    implementation: Implementation,
) -> tuple[Residual, Array, Array]:
    """Read the texts; return what is behind the layer, its keys and its values, by heads."""

    def attend(q, k, v, layer_input):
        out, _ = llama.attend_full(q, k, v, layer_input, implementation=implementation)
        return out, (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))

    module = llama.DecoderLayer(architecture, attend=attend)
    out: Any = module.apply({"params": layer}, x, cos_sin, None)
    x, (keys, values) = out
    return x, keys, values


@functools.partial(
    jax.jit,
    static_argnames=("architecture", "implementation", "chunk", "sink_size", "recent_size"),
)
def _repeat_layer(
    layer: llama.Params,
    x: Residual,
    keys: Float[Array, "batch kv_heads text head_dim"],
    values: Float[Array, "batch kv_heads text head_dim"],
    lengths: Int[Array, " batch"],
    counts: Int[Array, " batch"],
    start: Int[Array, ""],
    *,
    architecture: ModelConfig,
    implementation: Implementation,
    chunk: int,
    sink_size: int,
    recent_size: int,
) -> tuple[Residual, Float[Array, "batch kv_heads chunk"]]:
    """Read the repetition of a chunk; return what is behind the layer, and the keys' scores."""
    batch, width, _ = x.shape
    positions = lengths[:, None] + jnp.arange(width)[None]
    cos_sin = rope.rotation(architecture, positions, total_length=lengths + counts)
    rows = jnp.arange(batch)[:, None]

    def attend(q, k, v, layer_input):
        del layer_input
        room = ((0, 0), (0, 0), (0, width), (0, 0))
        all_keys, all_values = (
            jnp.pad(old, room).at[rows, :, positions].set(new)
            for old, new in ((keys, k), (values, v))
        )
        scale = q.shape[-1] ** -0.5
        options = {"softmax_scale": scale, "implementation": implementation}
        some_heads = functools.partial(prefill_attention, **options)
        arrays, axes = (q, all_keys, all_values, lengths), (2, 1, 1, None)
        out, _ = by_heads(some_heads, *arrays, axes=axes, kv_heads=k.shape[2])
        of_chunk = jax.lax.dynamic_slice_in_dim(keys, start, chunk, axis=2)
        sizes = {"sink_size": sink_size, "recent_size": recent_size}
        return out, largest_attention(
            q, keys[:, :, :_SINKS], of_chunk, k, lengths, counts, start, **sizes
        )

    module = llama.DecoderLayer(architecture, attend=attend)
    out: Any = module.apply({"params": layer}, x, cos_sin, None)
    return out


def largest_attention(
    q: Float[Array, "batch width q_heads head_dim"],
    first: Float[Array, "batch kv_heads first head_dim"],
    chunk: Float[Array, "batch kv_heads chunk head_dim"],
    own: Float[Array, "batch width kv_heads head_dim"],
    lengths: Int[Array, " batch"],
    counts: Int[Array, " batch"],
    start: Int[Array, ""],
    *,
    sink_size: int,
    recent_size: int,
) -> Float[Array, "batch kv_heads chunk"]:
    """Return the largest attention that any query of a repetition pays each key of a chunk.

    Args:
      q: queries of the repetition, which begins at position lengths[b].
      first: keys of the first tokens; they count in the softmax if they lie before the chunk.
      chunk: keys of the chunk.
      own: keys of the repetition.
      lengths: tokens of each text.
      counts: queries that count, of each row.
      start: position of the chunk's first key.
      sink_size: see `key_scores`.
      recent_size: see `key_scores`.
    """
    batch, width, _, head_dim = q.shape
    kv_heads, size = chunk.shape[1:3]
    wide = accumulator(q.dtype)
    keys = jnp.concatenate([first, chunk, jnp.swapaxes(own, 1, 2)], axis=2)
    place = start + jnp.arange(size)  # of the chunk's keys
    exists = place[None] < lengths[:, None]
    ahead = jnp.broadcast_to(jnp.arange(first.shape[2]) < start, (batch, first.shape[2]))
    before = jnp.concatenate([ahead, exists], axis=1)

    def near(length: Int[Array, ""], block: Int[Array, " block"]) -> Bool[Array, "block chunk"]:
        sizes = {"sink_size": sink_size, "recent_size": recent_size}
        return jnp.asarray(masks.streaming(length + block, place, **sizes))

    def one_block(
        largest: Float[Array, "batch kv_heads chunk"], block: Int[Array, " block"]
    ) -> tuple[Float[Array, "batch kv_heads chunk"], None]:
        grouped = q[:, block].reshape(batch, block.size, kv_heads, -1, head_dim)
        scores = jnp.einsum("btkgh,bksh->bkgts", grouped, keys, preferred_element_type=wide)
        seen = (batch, block.size)
        visible = jnp.concatenate(
            [
                jnp.broadcast_to(before[:, None], (*seen, before.shape[1])),
                jnp.broadcast_to(masks.causal(block, jnp.arange(width))[None], (*seen, width)),
            ],
            axis=2,
        )
        scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf)
        attention = jax.nn.softmax(scores, axis=-1)[..., first.shape[2] :][..., :size]
        counted = (block[None] < counts[:, None])[:, :, None] & exists[:, None]
        counted &= ~jax.vmap(near, in_axes=(0, None))(lengths, block)
        paid = jnp.max(jnp.where(counted[:, None, None], attention, 0), axis=(2, 3))
        return jnp.maximum(largest, paid.astype(jnp.float32)), None

    blocks = jnp.arange(width).reshape(-1, min(_BLOCK, width))
    nothing = jnp.zeros((batch, kv_heads, size), jnp.float32)
    return jax.lax.scan(one_block, nothing, blocks)[0]

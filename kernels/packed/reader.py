"""Attention over tiles of packed keys and values, in the registers of a Triton kernel.

The softmax is that of kernels.online_softmax; scores and sums are computed from the codes c. With
the scale a and zero z of a token's key, and of a token's value,

    score = scale * q (a c + z) = scale * (a (q c) + z sum(q))
    sum_t p_t v_t               = sum_t (p_t a_t) c_t + sum_t p_t z_t

so no number is ever dequantised: scales multiply scores and weights. Where the scales of keys
belong to channels, they multiply the queries instead, once per block. A tile of words gives one
matrix product per field: in 4 bits, 8 products of head_dim / 8 channels each.

A code becomes a bfloat16 by its bits: 0x4300 | c is 128 + c. That bias of 128 times the sum of the
other factor is subtracted afterwards. Where the other factor was rounded to the queries' dtype
(weights times scales, queries times scales), so is the middle of the codes: its rounding error
weighs less when codes lie around 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels import compat, online_softmax, reader, tile_io
from kernels.packed.layout import BLOCK, Layout, Packed
from kernels.reader import Mask, Operands
from kernels.tile_io import Ref, Scalar


class _Operand(NamedTuple):
    """The refs of packed keys or values of one head, in a kernel."""

    words: Ref  # [word_slots, words]
    scales: Ref  # [scale_slots, scales]
    zeros: Ref  # [scale_slots, scales]
    layout: Layout


class State(NamedTuple):
    """Running softmax per row of queries: `summed` of kernels.online_softmax is sums + added."""

    maximum: Float[Array, " rows"]
    total: Float[Array, " rows"]
    added: tuple[Float[Array, " rows"], ...]  # per group of value channels
    sums: tuple[Float[Array, "rows words"], ...]  # per field


Queries = tuple[Float[Array, "rows words"], ...]  # per field


def operands(
    k: Packed | Float[Array, "batch kv_heads slots head_dim"],
    v: Packed | Float[Array, "batch kv_heads slots head_dim"],
    index_map: Callable[..., tuple[Any, Any]],
    *,
    name: str,
) -> Operands:
    """Describe keys and values, packed or not; arguments as in kernels.reader.operands."""
    if isinstance(k, Array) and isinstance(v, Array):
        return reader.operands(k, v, index_map, name=name)
    assert isinstance(k, Packed)
    assert isinstance(v, Packed)
    leaves = (*k.leaves, *v.leaves)
    return Operands(
        arrays=leaves,
        specs=[
            pl.BlockSpec((None, None, *leaf.shape[2:]), lambda *at: (*index_map(*at), 0, 0))
            for leaf in leaves
        ],
        reader=functools.partial(PackedReader, layouts=(k.layout, v.layout)),  # pyright: ignore[reportArgumentType]
        name=f"{name}_packed",
    )


@dataclasses.dataclass(frozen=True)
class PackedReader:
    """Packed keys and values; see kernels.reader.Reader."""

    refs: Sequence[Ref]  # words, scales and zeros of the keys, then of the values
    _: dataclasses.KW_ONLY
    layouts: tuple[Layout, Layout]
    block_kv: int
    softmax_scale: float

    @property
    def slots(self) -> int:
        return self._keys.words.shape[0] * self.layouts[0].tokens_per_word

    @property
    def _keys(self) -> _Operand:
        words, scales, zeros = self.refs[:3]
        return _Operand(words, scales, zeros, self.layouts[0])

    @property
    def _values(self) -> _Operand:
        words, scales, zeros = self.refs[3:]
        return _Operand(words, scales, zeros, self.layouts[1])

    def load_queries(self, ref: jax.Ref, rows: Int[Array, " rows"], *, end: Scalar) -> Queries:
        """Read a tile per field."""
        words = ref.shape[-1] // self.layouts[0].fields
        return tuple(
            tile_io.load(ref, rows, end=end, columns=(field * words, words))
            for field in range(self.layouts[0].fields)
        )

    def start(self, queries: Queries) -> State:
        maximum, total = online_softmax.start_rows(queries[0].shape[:1], jnp.float32)
        return State(
            maximum=maximum,
            total=total,
            added=(total,) * self._values.scales.shape[1],
            sums=tuple(jnp.zeros(part.shape, jnp.float32) for part in queries),
        )

    def add_block(
        self, index: Scalar, state: State, queries: Queries, mask: Mask, *, end: Scalar
    ) -> State:
        """Let every row see the keys of block `index` that its mask allows.

        In 2 bits a block is at most half of the tokens that share words: all of them at once would
        take twice the products, and spill.
        """
        keys, values = self._keys, self._values
        first = index * self.block_kv
        first_word, block, half = first, index, None
        if keys.layout.tokens_per_word > 1:
            block, at = jax.lax.div(first, BLOCK), jax.lax.rem(first, BLOCK)
            half, at = jax.lax.div(at, BLOCK // 2).astype(jnp.uint32), jax.lax.rem(at, BLOCK // 2)
            first_word = block * (BLOCK // 2) + at
        positions = tile_io.indices(self.block_kv, first)
        rows = tile_io.indices(self.block_kv, first_word)
        word_end = end + (first_word - first)  # of the words of tokens before `end`
        key_words, value_words = (tile_io.load(x.words, rows, end=word_end) for x in (keys, values))
        scores = _scores(block, queries, keys, key_words, half, positions, end)
        scores = scores * self.softmax_scale
        scores = jnp.where(jnp.broadcast_to(mask(positions), scores.shape), scores, -jnp.inf)
        maximum, shrink = online_softmax.rescale(state.maximum, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - maximum[:, None])
        added, sums = [], []
        dtype, per_group = queries[0].dtype, len(state.sums) // len(state.added)
        for group, already in enumerate(state.added):
            scale, zero = _load_numbers(values, positions, end, group)
            scaled = (weights * scale[None, :]).astype(dtype)
            for field in range(group * per_group, (group + 1) * per_group):
                codes, bias = _codes(value_words, values.layout, field, half, dtype)
                sums.append(state.sums[field] * shrink[:, None] + _dot(scaled, codes, 0))
            middle = values.layout.middle
            lift = jnp.sum(weights * (zero + middle * scale)[None, :], axis=-1)
            lift = lift - (bias + middle) * jnp.sum(scaled.astype(jnp.float32), axis=-1)
            added.append(already * shrink + lift)
        return State(
            maximum=maximum,
            total=state.total * shrink + jnp.sum(weights, axis=-1),
            added=tuple(added),
            sums=tuple(sums),
        )

    def store(
        self,
        state: State,
        out_ref: jax.Ref,
        lse_ref: jax.Ref,
        rows: Int[Array, " rows"],
        *,
        end: Scalar,
    ) -> None:
        """Write output and lse; rows that saw no key get output 0 and lse -inf."""
        divisor, lse = online_softmax.finish_rows(state.maximum, state.total)
        per_group = len(state.sums) // len(state.added)
        outs = [
            (x + state.added[field // per_group][:, None]) / divisor[:, None]
            for field, x in enumerate(state.sums)
        ]
        words = out_ref.shape[-1] // len(outs)
        for field, out in enumerate(outs):
            tile_io.store(out_ref, rows, out, end=end, columns=(field * words, words))
        tile_io.store_vector(lse_ref, rows, lse, end=end)


def _scores(block, queries: Queries, keys: _Operand, words, half, positions, end):
    """Return the products of queries and keys."""
    dtype = queries[0].dtype
    products: Any = 0.0
    by_channel = keys.layout.by == "channel"
    scaled, constant = _into_queries(block, queries, keys) if by_channel else (queries, 0.0)
    for field, part in enumerate(scaled):
        codes, bias = _codes(words, keys.layout, field, half, dtype)
        products = products + _dot(part, codes, 1)
    total: Any = sum(jnp.sum(part.astype(jnp.float32), axis=-1) for part in scaled)
    if by_channel:
        return products + (constant - (bias + keys.layout.middle) * total)[:, None]
    scale, zero = _load_numbers(keys, positions, end, 0)
    return products * scale[None, :] + total[:, None] * (zero - bias * scale)[None, :]


def _into_queries(block, queries: Queries, keys: _Operand):
    """Return the queries times the scales of a block's channels, and what the middle code gives."""
    num_words = keys.words.shape[1]
    scaled, constant = [], 0.0
    for field, part in enumerate(queries):
        columns = tile_io.indices(tile_io.width(num_words), field * num_words)
        inside = columns < (field + 1) * num_words
        scale, zero = (
            compat.load(ref.at[block, columns], mask=inside, other=0).astype(jnp.float32)
            for ref in (keys.scales, keys.zeros)
        )
        wide = part.astype(jnp.float32)
        scaled.append((wide * scale[None, :]).astype(part.dtype))
        middle = zero + keys.layout.middle * scale
        constant = constant + jnp.sum(wide * middle[None, :], axis=-1)
    return scaled, constant


def _load_numbers(operand: _Operand, positions, end, group: int):
    """Return scale and zero of each token, for one group of channels, in float32."""
    return tuple(
        compat.load(ref.at[positions, group], mask=positions < end, other=0).astype(jnp.float32)
        for ref in (operand.scales, operand.zeros)
    )


def _codes(words, layout: Layout, field: int, half, dtype: DTypeLike):
    """Return codes plus a bias as floating-point numbers, and the bias."""
    shift = jnp.uint32(layout.shift(field, 0))
    if layout.tokens_per_word > 1:
        shift = shift + half * jnp.uint32(layout.bits)
    codes = (words >> shift) & jnp.uint32(2**layout.bits - 1)
    if dtype == jnp.bfloat16 and layout.bits < 8:
        codes = (codes | jnp.uint32(0x4300)).astype(jnp.uint16)
        return jax.lax.bitcast_convert_type(codes, jnp.bfloat16), 128.0
    # 2^23 + c in float32, less 2^23: cheaper than the conversion of an integer. Codes around 0 give
    # smaller products, of which less is lost where float32 is multiplied as TF32.
    wide = jax.lax.bitcast_convert_type(codes | jnp.uint32(0x4B000000), jnp.float32)
    half_of_all = 2.0 ** (layout.bits - 1)
    return (wide - (2.0**23 + half_of_all)).astype(dtype), -half_of_all


def _dot(a, b, contracting: int) -> Float[Array, "rows columns"]:
    dimensions = (((1,), (contracting,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

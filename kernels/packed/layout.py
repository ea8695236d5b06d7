"""Keys and values in 8, 4 or 2 bits per number, several to a 32-bit word.

A group of numbers x is stored as whole codes (asymmetric quantisation; KIVI, arXiv 2402.02750):

    zero = min(x),  scale = (max(x) - min(x)) / (2^bits - 1),  code = round((x - zero) / scale)

with scale and zero in float16; the codes are those of the rounded scale and zero. A number is
within half a scale of code * scale + zero, plus the rounding of zero and scale to float16.

These numbers share a scale:

    INT8, INT4    all channels of one token of one head (QServe's and DuoAttention's choice)
    INT2_VALUES   64 channels of one token of one head
    INT2_KEYS     64 consecutive tokens of one channel of one head: keys have channels that are
                  large in every token, which would drown the others (KIVI, section 3)

A head_dim that is not 64, 128 or 256 is one group. A word holds `fields` channels that are `words`
apart, so that a tile of words gives tiles of neighbouring channels without shuffling: channel
f * words + w is in field f of word w, counted from the lowest bits. In 2 bits a field of 4 bits
holds one channel of two tokens that are 32 apart, the earlier one in the lower bits, so tokens are
stored in whole blocks of 64.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float16, Int, UInt32

from kernels import pytree

BLOCK = 64  # tokens or channels that share a scale, in 2 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How numbers become codes, and codes words."""

    bits: Literal[2, 4, 8]
    by: Literal["token", "channel"]  # numbers of one token, or of one channel, share a scale

    @property
    def fields(self) -> int:
        """Channels per word."""
        return 4 if self.bits == 8 else 8

    @property
    def middle(self) -> float:
        """The middle of the codes."""
        return (2**self.bits - 1) / 2

    @property
    def tokens_per_word(self) -> int:
        return 2 if self.bits == 2 else 1

    @property
    def block(self) -> int:
        """Tokens that can only be written together."""
        return BLOCK if self.bits == 2 else 1

    @property
    def tokens_per_scale(self) -> int:
        return BLOCK if self.by == "channel" else 1

    def shift(self, field: int, half: int) -> int:
        """Return the lowest bit of a field; `half`: which of a word's tokens."""
        return field * 32 // self.fields + half * self.bits

    def bytes_per_token(self, head_dim: int) -> float:
        """Return the bytes that a token of one head takes, its share of the scales included."""
        words = head_dim / self.fields / self.tokens_per_word
        return 4 * words + 4 * self.num_scales(head_dim) / self.tokens_per_scale

    def num_scales(self, head_dim: int) -> int:
        """Return how many scales a token has, or a block of tokens by channel."""
        if self.by == "channel":
            return head_dim
        groups, rest = divmod(head_dim, BLOCK)
        # Kernels give every field one group.
        whole = self.bits == 2 and not rest and self.fields % groups == 0
        return groups if whole else 1


INT8 = Layout(bits=8, by="token")
INT4 = Layout(bits=4, by="token")
INT2_KEYS = Layout(bits=2, by="channel")
INT2_VALUES = Layout(bits=2, by="token")


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """An array [batch, kv_heads, slots, head_dim] in few bits."""

    words: UInt32[Array, "batch kv_heads word_slots words"]
    scales: Float16[Array, "batch kv_heads scale_slots scales"]
    zeros: Float16[Array, "batch kv_heads scale_slots scales"]
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the array that is packed."""
        batch, heads, slots, words = self.words.shape
        return batch, heads, slots * self.layout.tokens_per_word, words * self.layout.fields

    @property
    def leaves(self) -> tuple[Array, Array, Array]:
        return self.words, self.scales, self.zeros


def zeros(shape: tuple[int, int, int, int], layout: Layout) -> Packed:
    """Return packed zeros; the tokens must be whole blocks."""
    batch, heads, slots, head_dim = shape
    _check(slots, head_dim, layout)
    numbers = (batch, heads, slots // layout.tokens_per_scale, layout.num_scales(head_dim))
    words = (batch, heads, slots // layout.tokens_per_word, head_dim // layout.fields)
    return Packed(
        words=jnp.zeros(words, jnp.uint32),
        scales=jnp.zeros(numbers, jnp.float16),
        zeros=jnp.zeros(numbers, jnp.float16),
        layout=layout,
    )


def pack(x: Float[Array, "batch kv_heads slots head_dim"], layout: Layout) -> Packed:
    """Quantise an array; its slots must be whole blocks."""
    _check(x.shape[2], x.shape[3], layout)
    grouped = _grouped(x.astype(jnp.float32), layout)
    low, high = (f(grouped, axis=(3, 5), keepdims=True) for f in (jnp.min, jnp.max))
    highest = 2**layout.bits - 1
    scale = ((high - low) / highest).astype(jnp.float16)
    zero = low.astype(jnp.float16)
    wide = scale.astype(jnp.float32)
    steps = (grouped - zero.astype(jnp.float32)) / jnp.where(wide == 0, 1, wide)
    codes = jnp.clip(jnp.round(steps), 0, highest).astype(jnp.uint32).reshape(x.shape)
    batch, heads = x.shape[:2]
    return Packed(
        words=_to_words(codes, layout),
        scales=scale.reshape(batch, heads, scale.shape[2], -1),
        zeros=zero.reshape(batch, heads, zero.shape[2], -1),
        layout=layout,
    )


def unpack(
    packed: Packed, dtype: DTypeLike = jnp.float32
) -> Float[Array, "batch kv_heads slots head_dim"]:
    """Return the numbers that the codes stand for."""
    codes = _to_codes(packed.words, packed.layout)
    grouped = _grouped(codes.astype(jnp.float32), packed.layout)
    shape = (*grouped.shape[:3], 1, grouped.shape[4], 1)
    scale, zero = (y.astype(jnp.float32).reshape(shape) for y in (packed.scales, packed.zeros))
    return (grouped * scale + zero).reshape(packed.shape).astype(dtype)


def read_slots(
    x: Float[Array, "batch kv_heads slots head_dim"] | Packed,
    first: Int[Array, ""] | int,
    size: int,
    dtype: DTypeLike,
) -> Float[Array, "batch kv_heads size head_dim"]:
    """Return `size` consecutive slots of an array, unpacked; whole blocks of a packed array."""
    if not isinstance(x, Packed):
        return jax.lax.dynamic_slice_in_dim(x, first, size, axis=2)

    def part(leaf: Array) -> Array:
        ratio = x.shape[2] // leaf.shape[2]
        return jax.lax.dynamic_slice_in_dim(leaf, first // ratio, size // ratio, axis=2)

    return unpack(jax.tree.map(part, x), dtype)


def layout_of(x: Array | Packed) -> Layout | None:
    """Return the layout of an array that may be packed; None if it is not."""
    return x.layout if isinstance(x, Packed) else None


def _check(slots: int, head_dim: int, layout: Layout) -> None:
    if head_dim % layout.fields or slots % layout.block:
        raise ValueError(
            f"{slots} tokens of {head_dim} channels cannot be packed: {layout.bits} bits need "
            f"multiples of {layout.block} and {layout.fields}"
        )


def _grouped(x: Array, layout: Layout) -> Array:
    """Give the numbers that share a scale axes 3 and 5 of their own; by channel only axis 3."""
    batch, heads, slots, head_dim = x.shape
    if layout.by == "channel":
        return x.reshape(batch, heads, slots // BLOCK, BLOCK, head_dim, 1)
    groups = layout.num_scales(head_dim)
    return x.reshape(batch, heads, slots, 1, groups, head_dim // groups)


def _to_words(codes: UInt32[Array, "batch kv_heads slots head_dim"], layout: Layout) -> Array:
    batch, heads, slots, head_dim = codes.shape
    halves, fields = layout.tokens_per_word, layout.fields
    apart = layout.block // halves  # tokens between those that share a word
    codes = codes.reshape(batch, heads, -1, halves, max(apart, 1), fields, head_dim // fields)
    words: Any = sum(
        codes[:, :, :, half, :, field] << layout.shift(field, half)
        for half in range(halves)
        for field in range(fields)
    )
    return words.reshape(batch, heads, slots // halves, head_dim // fields)


def _to_codes(words: UInt32[Array, "batch kv_heads word_slots words"], layout: Layout) -> Array:
    batch, heads, word_slots, num_words = words.shape
    halves, fields = layout.tokens_per_word, layout.fields
    apart = max(layout.block // halves, 1)
    words = words.reshape(batch, heads, -1, 1, apart, 1, num_words)
    shifts = jnp.array(
        [[layout.shift(field, half) for field in range(fields)] for half in range(halves)],
        jnp.uint32,
    )
    codes = (words >> shifts[None, None, None, :, None, :, None]) & jnp.uint32(2**layout.bits - 1)
    return codes.reshape(batch, heads, word_slots * halves, num_words * fields)

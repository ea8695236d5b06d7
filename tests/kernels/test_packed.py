"""Keys and values in few bits: how close they stay, and where every bit lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import packed
from kernels.packed import INT2_KEYS, INT2_VALUES, INT4, INT8, Layout

LAYOUTS = {"int8": INT8, "int4": INT4, "int2 keys": INT2_KEYS, "int2 values": INT2_VALUES}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
HEAD_DIMS = [16, 64, 80, 128, 256]

pack = jax.jit(packed.pack, static_argnums=1)
unpack = jax.jit(packed.unpack, static_argnums=1)


def numbers(head_dim: int, *, slots: int = 192, size: float = 1.0) -> np.ndarray:
    """Return [2, 3, slots, head_dim] with a channel and a token that are larger than others."""
    rng = np.random.default_rng(head_dim)
    x = rng.standard_normal((2, 3, slots, head_dim)).astype(np.float32) * size
    x[..., 5] += 8 * size
    x[:, :, 7] *= 3
    return x


def groups(x: np.ndarray, layout: Layout) -> np.ndarray:
    """Return [groups, numbers]: what shares a scale, in the order of the scales' buffer."""
    head_dim = x.shape[-1]
    if layout.by == "channel":
        blocks = x.reshape(*x.shape[:2], -1, 64, head_dim)
        return np.swapaxes(blocks, 3, 4).reshape(-1, 64)
    size = 64 if layout.bits == 2 and head_dim % 64 == 0 else head_dim
    return x.reshape(-1, size)


@pytest.mark.one_in(7)
@every_layout
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_every_number_is_within_half_a_step(layout, head_dim, size):
    x = numbers(head_dim, size=size)
    error = np.abs(groups(np.asarray(unpack(pack(x, layout))) - x, layout))
    steps, largest = 2**layout.bits - 1, np.abs(groups(x, layout)).max(axis=1)
    spread = np.ptp(groups(x, layout), axis=1)
    # float16 rounds the zero, and the scale, of which the last code is `steps`; below 6e-5 its own
    # steps no longer shrink.
    rounding = 2**-11 * (largest + spread) + (1 + steps) * 2**-25
    assert (error.max(axis=1) <= 0.5 * spread / steps + rounding).all()
    # The bound is no empty one: some number is almost as far off.
    assert error.max() > 0.4 * (spread / steps).min()


@every_layout
def test_what_is_already_a_code_stays(layout):
    """Numbers on a grid whose scale float16 holds come back bit for bit."""
    steps = 2**layout.bits - 1
    codes = np.random.default_rng(0).integers(0, steps + 1, (1, 1, 128, 64))
    codes[:, :, ::64], codes[:, :, 1::64] = 0, steps  # every channel's and ...
    codes[..., 0], codes[..., 1] = 0, steps  # every token's least and greatest
    x = np.float32(0.25 * codes - 3)
    np.testing.assert_array_equal(unpack(pack(x, layout)), x)


@every_layout
@pytest.mark.parametrize("value", [0.0, -2.5, 1000.0])
def test_constants_are_exact(layout, value):
    x = np.full((1, 2, 64, 16), value, np.float32)
    np.testing.assert_array_equal(unpack(pack(x, layout)), x)


@every_layout
def test_groups_do_not_see_each_other(layout):
    x = numbers(128)
    other = x.copy()
    other[0, 1, 70, 3] = 50.0  # a token of the second block, a channel of the first 64
    changed = np.asarray(unpack(pack(x, layout))) != np.asarray(unpack(pack(other, layout)))
    share = np.zeros(x.shape, bool)
    if layout.by == "channel":
        share[0, 1, 64:128, 3] = True
    else:
        share[0, 1, 70, : 64 if layout.bits == 2 else 128] = True
    assert changed[share].mean() > 0.5
    assert not changed[~share].any()


def code(words: np.ndarray, token: int, channel: int, *, head_dim: int, bits: int) -> int:
    """Return the code of a token's channel, straight from the documented layout."""
    fields = {8: 4, 4: 8, 2: 8}[bits]
    num_words = head_dim // fields
    field, word = divmod(channel, num_words)
    if bits == 2:
        block, at = divmod(token, 64)
        half, row = divmod(at, 32)
        return int(words[block * 32 + row, word]) >> (4 * field + 2 * half) & 3
    return int(words[token, word]) >> (bits * field) & (2**bits - 1)


@every_layout
def test_every_code_lies_where_the_layout_says(layout):
    head_dim = 128
    x = numbers(head_dim, slots=128)
    stored = pack(x, layout)
    words = np.asarray(stored.words)[1, 2]
    scales, zeros = (np.asarray(y)[1, 2].astype(np.float32) for y in (stored.scales, stored.zeros))
    back = np.asarray(unpack(stored))[1, 2]
    for token, channel in [(0, 0), (1, 127), (31, 16), (32, 15), (63, 64), (64, 63), (127, 100)]:
        if layout.by == "channel":
            at = token // 64, channel
        else:
            at = token, channel // 64 if layout.bits == 2 else 0
        got = code(words, token, channel, head_dim=head_dim, bits=layout.bits)
        assert back[token, channel] == pytest.approx(got * scales[at] + zeros[at], rel=1e-6)


@every_layout
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_bytes_per_token_are_those_of_the_buffers(layout, head_dim):
    stored = packed.zeros((1, 1, 640, head_dim), layout)
    assert stored.shape == (1, 1, 640, head_dim)
    measured = sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) / 640
    assert measured == layout.bytes_per_token(head_dim)


def test_the_published_int4_format_takes_68_bytes_per_token_and_head():
    assert INT4.bytes_per_token(128) == 64 + 4
    assert INT2_KEYS.bytes_per_token(128) == INT2_VALUES.bytes_per_token(128) == 32 + 8


@pytest.mark.one_in(3)
@every_layout
def test_read_slots_cuts_out_whole_blocks(layout):
    stored = pack(numbers(64), layout)
    got = packed.read_slots(stored, jnp.int32(64), 64, jnp.float32)
    np.testing.assert_array_equal(got, unpack(stored)[:, :, 64:128])
    unpacked = unpack(stored)
    np.testing.assert_array_equal(
        packed.read_slots(unpacked, 3, 5, jnp.float32), unpacked[:, :, 3:8]
    )


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_numbers_that_share_a_scale_fill_whole_fields(head_dim):
    """As kernels read them."""
    groups = INT2_VALUES.num_scales(head_dim)
    assert head_dim % groups == 0
    assert INT2_VALUES.fields % groups == 0
    assert groups == (head_dim // 64 if head_dim in (64, 128, 256) else 1)


@pytest.mark.parametrize(
    ("layout", "shape"), [(INT4, (8, 20)), (INT8, (8, 6)), (INT2_KEYS, (63, 16))]
)
def test_what_cannot_be_packed_is_refused(layout, shape):
    with pytest.raises(ValueError, match=f"{shape[0]} tokens of {shape[1]} channels"):
        packed.pack(jnp.zeros((1, 1, *shape)), layout)

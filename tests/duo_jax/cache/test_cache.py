"""The two caches: what is in which slot, how many bytes they take, and that nothing copies them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import cache as caches
from duo_jax import serve
from duo_jax.cache import KVCache, cache_bytes, init_cache
from duo_jax.cache.update import append, append_to_ring, append_token_to_ring, past
from duo_jax.heads.split import DuoConfig, split_params
from duo_jax.model.config import ModelConfig
from tests.params import random_params

pytestmark = pytest.mark.core

BATCH, KV_HEADS, HEAD_DIM = 3, 2, 4
STALE = -7.0  # what every slot holds before anything is written to it


def duo(
    retrieval_counts=(1, 3), *, sink=4, recent=6, kv_heads=4, head_dim=16, **model
) -> DuoConfig:
    config = ModelConfig(
        family="llama",
        num_layers=len(retrieval_counts),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        max_positions=2**20,
        **{"vocab_size": 64, "embed_size": 32, "mlp_size": 32, "num_q_heads": 8, **model},
    )
    return DuoConfig(
        architecture=config, retrieval_counts=retrieval_counts, sink_size=sink, recent_size=recent
    )


def stale_cache(slots: int) -> KVCache:
    shape = (BATCH, KV_HEADS, slots, HEAD_DIM)
    return KVCache(keys=jnp.full(shape, STALE), values=jnp.full(shape, 2 * STALE))


def numbered(positions):
    """Return [batch, length, kv_heads, head_dim] in which no two elements are equal."""
    positions = np.asarray(positions, np.float32)
    rows = np.arange(BATCH, dtype=np.float32)[:, None] * 1000
    rest = np.arange(KV_HEADS * HEAD_DIM, dtype=np.float32).reshape(KV_HEADS, HEAD_DIM) / 16
    return jnp.asarray((rows + positions)[:, :, None, None] + rest)


def slots_of(position_of_slot):
    """Return the buffers in which row b's slot s holds position_of_slot[b][s]; None is stale."""
    at = np.array([[-1 if p is None else p for p in row] for row in position_of_slot])
    filled = (at >= 0)[:, None, :, None]
    keys = np.moveaxis(np.asarray(numbered(at)), 1, 2)
    return np.where(filled, keys, STALE), np.where(filled, -keys, 2 * STALE)


def assert_holds(cache: KVCache, position_of_slot) -> None:
    keys, values = slots_of(position_of_slot)
    np.testing.assert_array_equal(cache.keys, keys)
    np.testing.assert_array_equal(cache.values, values)


# ---- append


@pytest.mark.one_in(2)
@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("starts", [(0, 1, 2), (5, 6, 7), (7, 8, 20)])
def test_append_writes_where_it_is_told_and_drops_what_has_no_slot(length, starts):
    num_tokens = np.array([length, length - 1, max(length - 3, 0)])
    new = numbered(np.array(starts)[:, None] + np.arange(length))
    cache = append(
        stale_cache(slots=8),
        new,
        -new,
        starts=jnp.array(starts),
        num_tokens=jnp.asarray(num_tokens),
    )
    expected = [
        [slot if start <= slot < start + num else None for slot in range(8)]
        for start, num in zip(starts, num_tokens, strict=True)
    ]
    assert_holds(cache, expected)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("length", [1, 3, 30])
def test_no_tokens_change_no_bit(length):
    cache = stale_cache(slots=10)
    new = jnp.full((BATCH, length, KV_HEADS, HEAD_DIM), jnp.nan)
    nothing = jnp.zeros(BATCH, jnp.int32)
    lengths = jnp.array([0, 7, 23])
    place = {"lengths": lengths, "num_tokens": nothing, "sink_size": 4}
    unchanged = [
        append(cache, new, new, starts=lengths, num_tokens=nothing),
        append_to_ring(cache, new, new, **place),
    ]
    if length == 1:
        unchanged.append(append_token_to_ring(cache, new, new, **place))
    for got in unchanged:
        assert_holds(got, [[None] * 10] * BATCH)


# ---- the ring


def ring_positions(length: int, *, sink: int, recent: int) -> list[int | None]:
    """Return which position each slot holds after `length` tokens, one by one as defined."""
    slots = [None] * (sink + recent)
    for position in range(length):
        slots[position if position < sink else sink + (position - sink) % recent] = position
    return slots


@functools.partial(jax.jit, static_argnames="sink_size")
def append_and_lay_out(cache, new, lengths, num_tokens, sink_size):
    """Return the ring after a chunk, and what its streaming heads are shown of the past."""
    args = {"lengths": lengths, "num_tokens": num_tokens, "sink_size": sink_size}
    return append_to_ring(cache, new, -new, **args), past(cache, new, -new, **args)


append_one = functools.partial(jax.jit, static_argnames="sink_size")(append_token_to_ring)


RINGS = [(4, 6), (0, 1)]
RINGS += [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((0, 5), (3, 1), (1, 16))]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("sink", "recent"), RINGS)
def test_after_any_chunks_every_slot_holds_what_the_definition_says(sink, recent):
    rng = np.random.default_rng(sink * 100 + recent)
    cache, lengths = stale_cache(slots=sink + recent), np.zeros(BATCH, int)
    for step in range(40):
        width = (1, 2, 7, sink + recent + 1, 3 * (sink + recent) + 2)[step % 5 if step < 5 else
                                                                      rng.integers(5)]  # fmt: skip
        # Rows grow at different rates, some not at all, and the chunk's tail is padding.
        num_tokens = rng.integers(0, width + 1, BATCH)
        new = numbered(lengths[:, None] + np.arange(width))
        padding = (np.arange(width) >= num_tokens[:, None])[:, :, None, None]
        new = jnp.where(padding, jnp.nan, new)
        place = {"lengths": jnp.asarray(lengths), "num_tokens": jnp.asarray(num_tokens)}
        before = cache
        cache, _ = append_and_lay_out(cache, new, **place, sink_size=sink)
        lengths += num_tokens
        expected = [ring_positions(n, sink=sink, recent=recent) for n in lengths]
        assert_holds(cache, expected)
        if width == 1:
            assert_holds(append_one(before, new, -new, **place, sink_size=sink), expected)
    assert lengths.min() > 3 * (sink + recent)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("sink", "recent"), RINGS)
def test_past_lays_out_sinks_and_recents_in_order_of_position(sink, recent):
    slots = sink + recent
    for lengths in ([0, 1, sink], [slots - 1, slots, slots + 1], [2 * slots, 5 * slots + 3, 2]):
        keys, values = slots_of([ring_positions(n, sink=sink, recent=recent) for n in lengths])
        cache = KVCache(keys=jnp.asarray(keys), values=jnp.asarray(values))
        num_tokens = [0, 2, 3]
        new = numbered(np.array(lengths)[:, None] + np.arange(3))
        _, past = append_and_lay_out(
            cache, new, jnp.array(lengths), jnp.array(num_tokens), sink_size=sink
        )
        assert past.lengths.tolist() == lengths
        ends = np.add(lengths, num_tokens)
        sinks = slots_of([[p if p < end else None for p in range(sink)] for end in ends])
        np.testing.assert_array_equal(past.sink_keys, sinks[0].reshape(past.sink_keys.shape))
        np.testing.assert_array_equal(past.sink_values, sinks[1].reshape(past.sink_values.shape))
        assert past.recent_keys.shape[2] == recent
        for row, length in enumerate(lengths):
            # Of earlier positions than these nothing is promised; the sinks stand in for them.
            known = np.arange(max(length - recent, sink), length)
            tail = slice(recent - len(known), recent)
            expected = np.moveaxis(np.asarray(numbered([known] * BATCH)), 1, 2)[row]
            np.testing.assert_array_equal(past.recent_keys[row, :, tail], expected)
            np.testing.assert_array_equal(past.recent_values[row, :, tail], -expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_stored_bit_for_bit(dtype):
    old = jax.tree.map(lambda x: x.astype(dtype), stale_cache(slots=5))
    new = jax.random.normal(jax.random.key(0), (BATCH, 7, KV_HEADS, HEAD_DIM), dtype)
    lengths, num_tokens = jnp.array([0, 1, 9]), jnp.array([7, 7, 7])
    got = append_to_ring(old, new, new, lengths=lengths, num_tokens=num_tokens, sink_size=2)
    assert got.keys.dtype == dtype
    # Row 0 ends at position 6: positions 0 and 1 are sinks, 5, 6 and 4 in the ring.
    np.testing.assert_array_equal(
        got.keys[0], jnp.swapaxes(new[0, jnp.array([0, 1, 5, 6, 4])], 0, 1)
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kv", ["int8", "int4", "int2"])
def test_growing_keeps_what_is_packed(kv):
    cache = init_cache(duo((0, 3, 4)), batch_size=2, max_len=100, kv=kv)
    cache = jax.tree.map(lambda x: x + np.ones((), x.dtype), cache)
    grown = caches.grow(cache, max_len=300)
    larger = 0
    for old, new in zip(*map(jax.tree.leaves, (cache, grown)), strict=True):
        np.testing.assert_array_equal(new[tuple(map(slice, old.shape))], old)
        larger += new.size > old.size
    assert larger >= 4  # keys and values of two layers


def test_growing_keeps_every_token_and_the_rings_as_they_are():
    cache = init_cache(duo((0, 3, 4)), batch_size=2, max_len=8)
    cache = jax.tree.map(lambda x: x + 1, cache)
    grown = caches.grow(cache, max_len=13)
    assert grown.lengths.tolist() == cache.lengths.tolist()
    for old, new in zip(cache.layers, grown.layers, strict=True):
        for a, b in zip(
            jax.tree.leaves(old.streaming), jax.tree.leaves(new.streaming), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(jax.tree.leaves(old.full), jax.tree.leaves(new.full), strict=True):
            assert b.shape[2] == 13
            np.testing.assert_array_equal(b[:, :, :8], a)


# ---- bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("retrieval_counts", [(1, 3), (0, 4), (0, 0), (4, 4)])
def test_bytes_are_those_of_the_live_buffers(retrieval_counts, dtype):
    config = duo(retrieval_counts)
    cache = init_cache(config, batch_size=3, max_len=50, dtype=dtype)
    buffers = jax.tree.leaves(cache.layers)
    on_device = sum(buffer.on_device_size_in_bytes() for buffer in buffers)
    formula = cache_bytes(config, batch_size=3, max_len=50, dtype=dtype)
    assert cache.nbytes == on_device == formula
    assert {buffer.dtype for buffer in buffers} == {jnp.dtype(dtype)}
    assert not any(buffer.any() for buffer in buffers)
    for layer, heads in zip(cache.layers, retrieval_counts, strict=True):
        full = layer.full[0].keys.shape if layer.full else None
        ring = None if layer.streaming is None else layer.streaming.values.shape
        assert full == ((3, heads, 50, 16) if heads else None)
        assert ring == ((3, 4 - heads, 10, 16) if heads < 4 else None)


# SPEC section 6, at half of the heads.
LLAMA_3_8B_1048K = "1 1 3 2 2 4 2 4 6 4 5 3 2 6 5 5 5 6 3 5 6 3 3 6 4 4 3 4 6 5 8 2"
LLAMA_3_8B_4194K = "2 1 3 0 2 5 2 4 5 3 4 4 1 6 5 5 5 6 3 3 6 4 5 5 5 5 5 6 5 5 8 0"


@pytest.mark.parametrize("counts", [LLAMA_3_8B_1048K, LLAMA_3_8B_4194K], ids=["1048k", "4194k"])
def test_llama_3_8b_at_a_million_tokens_takes_the_bytes_it_should(counts):
    counts = tuple(int(count) for count in counts.split())
    config = duo(counts, sink=128, recent=256, kv_heads=8, head_dim=128, num_q_heads=32)
    make = functools.partial(
        init_cache, config, batch_size=1, max_len=1_000_000, dtype=jnp.bfloat16
    )
    buffers = jax.eval_shape(lambda: jax.tree.leaves(make().layers))
    got = sum(buffer.size * buffer.dtype.itemsize for buffer in buffers)
    # A key or value is 256 bytes: 128 heads keep a million, 128 heads keep 384.
    assert got == 2 * 256 * 128 * (1_000_000 + 384)
    assert got == cache_bytes(config, batch_size=1, max_len=1_000_000, dtype=jnp.bfloat16)


# ---- in place


@functools.cache
def served():
    """Return a config and its parameters."""
    config = duo((2,), sink=16, recent=48)
    params = random_params(config.architecture)
    heads = np.array([[0, 1, 0, 1]], bool)
    return config, split_params(config.architecture, params, heads)


def decode_many(config, params, cache, tokens):
    def body(state):
        step, cache, tokens = state
        logits, cache = serve.decode(config, params, cache, tokens)
        return step + 1, cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.while_loop(lambda state: state[0] < 5, body, (0, cache, tokens))[1]


def decode_once(config, params, cache, tokens):
    return serve.decode(config, params, cache, tokens)[1]


def prefill_chunk(mode, config, params, cache, tokens):
    chunk = jnp.broadcast_to(tokens[:, None], (tokens.shape[0], 64))
    num_tokens = jnp.full_like(tokens, 50)
    return serve.prefill(config, params, cache, chunk, num_tokens, mode=mode)[1]


STEPS = {
    "a decode step, three rows": (decode_once, 3),
    "a loop of decode steps, one row": (decode_many, 1),
    "an exact chunk": (functools.partial(prefill_chunk, "exact"), 3),
}
MORE_STEPS = {
    "a decode step, one row": (decode_once, 1),
    "a loop of decode steps, three rows": (decode_many, 3),
    "a chunk seen whole": (functools.partial(prefill_chunk, "chunk"), 3),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("step", "batch_size"),
    [
        *(pytest.param(*case, id=name) for name, case in STEPS.items()),
        *(
            pytest.param(*case, id=name, marks=pytest.mark.slow)
            for name, case in MORE_STEPS.items()
        ),
    ],
)
def test_a_donated_cache_is_updated_in_place(step, batch_size):
    config, params = served()
    cache = init_cache(config, batch_size=batch_size, max_len=2**16)
    buffers, structure = jax.tree.flatten(cache)

    # Of leaves, since `lower` makes trees of descriptions, which the type checker does not accept.
    @functools.partial(jax.jit, donate_argnums=1)
    def on_buffers(params, buffers, tokens):
        cache = step(config, params, jax.tree.unflatten(structure, buffers), tokens)
        return jax.tree.leaves(cache)

    tokens = jnp.ones(batch_size, jnp.int32)
    compiled = on_buffers.lower(params, buffers, tokens).compile()
    memory = compiled.memory_analysis()
    keys = cache.layers[0].full[0].keys.nbytes
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < keys  # the scores; head_dim is only 16 here

    before = [buffer.unsafe_buffer_pointer() for buffer in buffers]
    after = compiled(params, buffers, tokens)
    assert [buffer.unsafe_buffer_pointer() for buffer in after] == before
    assert all(buffer.is_deleted() for buffer in buffers)
    assert all(buffer.any() for buffer in after)

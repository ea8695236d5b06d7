"""Attention against float64 numpy, at the lengths where blocks and windows meet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Past, full_attention, heads, masks, streaming_attention
from kernels.full.cases import FullCase
from kernels.streaming.cases import StreamingCase
from tests.kernels import oracle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(StreamingCase):
    sink: int = 4
    recent: int = 24
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    batch: int = 2
    dtype: str = "float32"


CASES = {
    "one token": Case(length=1),
    "three tokens": Case(length=3),
    "sinks only": Case(length=4),
    "one short of sink + recent": Case(length=27),
    "sink + recent": Case(length=28),
    "one past sink + recent": Case(length=29),
    "odd length, group of 7": Case(length=97, q_heads=7, kv_heads=1),
    "several blocks, group of 1": Case(length=300, q_heads=3, kv_heads=3),
    "no sinks": Case(length=97, sink=0),
    "recent is the token itself": Case(length=97, recent=1),
    "recent longer than the text": Case(length=97, recent=200),
    "sinks longer than the text": Case(length=97, sink=120),
    "head_dim 80": Case(length=65, head_dim=80),
    "paper sizes": Case(length=515, sink=128, recent=256, batch=1, head_dim=128),
}


def as_full(case: Case) -> FullCase:
    """Return the same sequences under full attention."""
    names = {field.name for field in dataclasses.fields(FullCase)}
    return FullCase(**{name: x for name, x in vars(case).items() if name in names})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_streaming_matches_float64(case):
    q, k, v = case.draw()
    out, _ = streaming_attention(
        q, k, v, sink_size=case.sink, recent_size=case.recent, softmax_scale=case.softmax_scale
    )
    expected, _ = oracle.expected(case, (q, k, v))
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_full_matches_float64(case):
    q, k, v = case.draw()
    out = full_attention(q, k, v, softmax_scale=case.softmax_scale)
    (expected,) = oracle.expected(as_full(case), (q, k, v))
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)


def test_head_groups_share_memory_bound_without_changing_the_result(monkeypatch):
    case = Case(length=97, q_heads=8, kv_heads=4)
    sizes = {"sink_size": case.sink, "recent_size": case.recent}
    streaming, _ = streaming_attention(*case.draw(), softmax_scale=case.softmax_scale, **sizes)
    full = full_attention(*case.draw(), softmax_scale=case.softmax_scale)
    monkeypatch.setattr(heads, "_SCORE_BYTES", 1)
    one_by_one, _ = streaming_attention(*case.draw(), softmax_scale=case.softmax_scale, **sizes)
    np.testing.assert_allclose(streaming, one_by_one, atol=1e-6)
    one_by_one = full_attention(*case.draw(), softmax_scale=case.softmax_scale)
    np.testing.assert_allclose(full, one_by_one, atol=1e-6)


def test_bfloat16_keeps_its_dtype_and_its_accuracy():
    case = CASES["several blocks, group of 1"]
    q, k, v = (x.astype(jnp.bfloat16) for x in case.draw())
    out, _ = streaming_attention(
        q, k, v, sink_size=case.sink, recent_size=case.recent, softmax_scale=case.softmax_scale
    )
    assert out.dtype == jnp.bfloat16
    expected, _ = oracle.expected(case, (q, k, v))
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.03)


@pytest.mark.parametrize("name", ["odd length, group of 7", "no sinks", "one past sink + recent"])
def test_gradients_equal_those_of_the_dense_form(name):
    case = CASES[name]
    q, k, v = case.draw()
    positions = jnp.arange(case.length)

    def dense(q, k, v, mask):
        grouped = q.reshape(*q.shape[:2], case.kv_heads, -1, case.head_dim)
        scores = case.softmax_scale * jnp.einsum("btkgh,bskh->bkgts", grouped, k)
        weights = jax.nn.softmax(jnp.where(mask[None, None, None], scores, -jnp.inf))
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)

    streaming_mask = masks.streaming(
        positions, positions, sink_size=case.sink, recent_size=case.recent
    )
    pairs = [
        (
            lambda q, k, v: streaming_attention(
                q,
                k,
                v,
                sink_size=case.sink,
                recent_size=case.recent,
                softmax_scale=case.softmax_scale,
            )[0],
            lambda q, k, v: dense(q, k, v, streaming_mask),
        ),
        (
            lambda q, k, v: full_attention(q, k, v, softmax_scale=case.softmax_scale),
            lambda q, k, v: dense(q, k, v, masks.causal(positions, positions)),
        ),
    ]
    for blocked, plain in pairs:
        got = jax.grad(lambda *x, f=blocked: jnp.sum(jnp.sin(f(*x))), (0, 1, 2))(q, k, v)
        want = jax.grad(lambda *x, f=plain: jnp.sum(jnp.sin(f(*x))), (0, 1, 2))(q, k, v)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("sizes", [{"sink_size": -1, "recent_size": 4},
                                   {"sink_size": 1, "recent_size": 0}])  # fmt: skip
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at least"):
        streaming_attention(*Case(length=3).draw(), softmax_scale=1.0, **sizes)


# ---- a chunk with a past


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkCase(Case):
    starts: tuple[int, ...]  # of each row's chunk

    @property
    def total(self) -> int:
        return max(self.starts) + self.length

    @property
    def whole(self) -> Case:
        """The texts that end with the chunks, or later."""
        return dataclasses.replace(self, length=self.total, batch=len(self.starts))


CHUNK_CASES = {
    "one token": ChunkCase(length=1, starts=(0, 3, 27, 28, 29)),
    "three tokens": ChunkCase(length=3, starts=(0, 1, 3, 4, 200)),
    "one short of sink + recent": ChunkCase(length=27, starts=(0, 1, 27, 28, 55)),
    "sink + recent": ChunkCase(length=28, starts=(0, 28, 2)),
    "one past sink + recent": ChunkCase(length=29, starts=(0, 29, 3)),
    "odd length, group of 7": ChunkCase(length=97, q_heads=7, kv_heads=1, starts=(0, 5, 97)),
    "several blocks, group of 1": ChunkCase(length=300, q_heads=3, kv_heads=3, starts=(0, 130)),
    "no sinks": ChunkCase(length=40, sink=0, starts=(0, 10, 40)),
    "recent is the token itself": ChunkCase(length=40, recent=1, starts=(0, 2, 40)),
    "recent one past a block": ChunkCase(length=20, recent=17, starts=(0, 16, 40)),
    "recent longer than the text": ChunkCase(length=20, recent=200, starts=(0, 30)),
    "sinks longer than the text": ChunkCase(length=20, sink=120, starts=(0, 7, 90)),
    "head_dim 80": ChunkCase(length=33, head_dim=80, starts=(0, 50)),
    "paper sizes": ChunkCase(
        length=100, sink=128, recent=256, head_dim=128, kv_heads=1, starts=(0, 60, 383, 500)
    ),
}
every_chunk_case = pytest.mark.parametrize("case", CHUNK_CASES.values(), ids=CHUNK_CASES.keys())


def draw_chunk(case: ChunkCase, dtype=jnp.float32, *, stale=1e4):
    """Return (q, k, v) of every row's whole text, those of its chunk, and the chunk's past."""
    whole = [np.asarray(x.astype(dtype)) for x in case.whole.draw()]
    rows = np.arange(len(case.starts))[:, None]
    starts = np.array(case.starts)[:, None]

    def held(x, positions, known):
        kept = np.where(known[:, :, None, None], x[rows, positions * known], x.dtype.type(stale))
        return jnp.asarray(np.moveaxis(kept, 1, 2))

    sinks = np.broadcast_to(np.arange(case.sink), (len(rows), case.sink))
    recents = starts + np.arange(-case.recent, 0)
    has_come, is_recent = sinks < starts + case.length, recents >= case.sink
    past = Past(
        sink_keys=held(whole[1], sinks, has_come),
        sink_values=held(whole[2], sinks, has_come),
        recent_keys=held(whole[1], recents, is_recent),
        recent_values=held(whole[2], recents, is_recent),
        lengths=jnp.asarray(starts[:, 0]),
    )
    chunk = [jnp.asarray(x[rows, starts + np.arange(case.length)]) for x in whole]
    return whole, chunk, past


def attend_chunk(case: ChunkCase, chunk, past):
    @jax.jit
    def attend(chunk, past):
        sizes = {"sink_size": case.sink, "recent_size": case.recent}
        return streaming_attention(*chunk, **sizes, softmax_scale=case.softmax_scale, past=past)[0]

    return attend(chunk, past)


def expected_of_chunk(case: ChunkCase, whole):
    out, _ = oracle.expected(case.whole, whole)
    chunks = [row[start : start + case.length] for row, start in zip(out, case.starts, strict=True)]
    return np.stack(chunks)


@every_chunk_case
def test_a_chunk_with_its_past_equals_its_part_of_the_whole(case):
    whole, chunk, past = draw_chunk(case)
    out = attend_chunk(case, chunk, past)
    np.testing.assert_allclose(out, expected_of_chunk(case, whole), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["three tokens", "odd length, group of 7", "paper sizes"])
def test_half_precision_chunks_err_at_most_twice_as_much_as_the_dense_form(name, dtype):
    case = CHUNK_CASES[name]
    whole, chunk, past = draw_chunk(case, dtype)
    out = attend_chunk(case, chunk, past)
    assert out.dtype == dtype
    expected = expected_of_chunk(case, whole)

    @jax.jit
    def dense(q, k, v):  # heads first, [batch, kv_heads, length, group, head_dim]
        positions = jnp.arange(case.total)
        mask = masks.streaming(positions, positions, sink_size=case.sink, recent_size=case.recent)
        scores = jnp.einsum("bktgh,bksh->bktgs", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[None, None, :, None], scores * case.softmax_scale, -jnp.inf)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        out = jnp.einsum("bktgs,bksh->bktgh", weights, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    q, k, v = (jnp.asarray(x) for x in whole)
    q = q.reshape(*q.shape[:2], case.kv_heads, -1, case.head_dim)
    once = jnp.moveaxis(dense(*(jnp.moveaxis(x, 2, 1) for x in (q, k, v))), 1, 2)
    once = np.asarray(once.reshape(whole[0].shape), np.float64)
    once = np.stack([row[s : s + case.length] for row, s in zip(once, case.starts, strict=True)])

    error = np.abs(np.asarray(out, np.float64) - expected).max()
    assert error <= 2 * np.abs(once - expected).max()


@pytest.mark.parametrize("name", ["three tokens", "one past sink + recent", "paper sizes"])
def test_what_unfilled_slots_of_the_past_hold_changes_no_bit(name):
    case = CHUNK_CASES[name]
    _, chunk, past = draw_chunk(case, stale=0.0)
    _, _, stale_past = draw_chunk(case, stale=-1e9)
    assert not np.array_equal(past.recent_keys, stale_past.recent_keys)
    np.testing.assert_array_equal(
        attend_chunk(case, chunk, past), attend_chunk(case, chunk, stale_past)
    )


def test_rows_of_chunks_do_not_see_each_other():
    case = CHUNK_CASES["one past sink + recent"]
    _, chunk, past = draw_chunk(case)
    out = attend_chunk(case, chunk, past)
    lengths = past.lengths
    chunk, past = jax.tree.map(
        lambda x: x if x.dtype == lengths.dtype else x.at[1].set(jnp.nan), (chunk, past)
    )
    spoilt = attend_chunk(case, chunk, past)
    assert np.isnan(spoilt[1]).all()
    np.testing.assert_array_equal(spoilt[jnp.array([0, 2])], out[jnp.array([0, 2])])


def test_float64_chunks_stay_float64():
    case = CHUNK_CASES["one past sink + recent"]
    with jax.enable_x64(True):
        whole, chunk, past = draw_chunk(case, jnp.float64)
        out = attend_chunk(case, chunk, past)
        assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, expected_of_chunk(case, whole), atol=1e-13)

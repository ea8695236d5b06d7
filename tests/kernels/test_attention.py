"""Attention against float64 numpy, at the lengths where blocks and windows meet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention, full_attention, masks, streaming_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    length: int
    sink: int = 4
    recent: int = 24
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    batch: int = 2

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


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


def draw(case: Case):
    rng = np.random.default_rng(0)
    shapes = [(case.batch, case.length, n, case.head_dim) for n in (case.q_heads, case.kv_heads)]
    drawn = [rng.standard_normal(s, np.float32) for s in (shapes[0], shapes[1], shapes[1])]
    return [jnp.asarray(x) for x in drawn]


def reference(q, k, v, *, scale, sink=None, recent=None):
    """Attend in float64, one query at a time, straight from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.empty_like(q)
    for i in range(q.shape[1]):
        seen = [j for j in range(i + 1) if recent is None or j < sink or i - j < recent]
        for head in range(q.shape[2]):
            scores = scale * np.einsum("bh,bsh->bs", q[:, i, head], k[:, seen, head // group])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[:, i, head] = np.einsum("bs,bsh->bh", weights, v[:, seen, head // group])
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_streaming_matches_float64(case):
    q, k, v = draw(case)
    out = streaming_attention(
        q, k, v, sink_size=case.sink, recent_size=case.recent, softmax_scale=case.scale
    )
    expected = reference(q, k, v, scale=case.scale, sink=case.sink, recent=case.recent)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_full_matches_float64(case):
    q, k, v = draw(case)
    out = full_attention(q, k, v, softmax_scale=case.scale)
    np.testing.assert_allclose(out, reference(q, k, v, scale=case.scale), atol=2e-6, rtol=2e-5)


def test_head_groups_share_memory_bound_without_changing_the_result(monkeypatch):
    case = Case(length=97, q_heads=8, kv_heads=4)
    sizes = {"sink_size": case.sink, "recent_size": case.recent}
    streaming = streaming_attention(*draw(case), softmax_scale=case.scale, **sizes)
    full = full_attention(*draw(case), softmax_scale=case.scale)
    monkeypatch.setattr(attention, "_SCORE_BYTES", 1)
    one_by_one = streaming_attention(*draw(case), softmax_scale=case.scale, **sizes)
    np.testing.assert_allclose(streaming, one_by_one, atol=1e-6)
    one_by_one = full_attention(*draw(case), softmax_scale=case.scale)
    np.testing.assert_allclose(full, one_by_one, atol=1e-6)


def test_bfloat16_keeps_its_dtype_and_its_accuracy():
    case = CASES["several blocks, group of 1"]
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(case))
    out = streaming_attention(
        q, k, v, sink_size=case.sink, recent_size=case.recent, softmax_scale=case.scale
    )
    assert out.dtype == jnp.bfloat16
    expected = reference(q, k, v, scale=case.scale, sink=case.sink, recent=case.recent)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.03)


@pytest.mark.parametrize("name", ["odd length, group of 7", "no sinks", "one past sink + recent"])
def test_gradients_equal_those_of_the_dense_form(name):
    case = CASES[name]
    q, k, v = draw(case)
    positions = jnp.arange(case.length)

    def dense(q, k, v, mask):
        grouped = q.reshape(*q.shape[:2], case.kv_heads, -1, case.head_dim)
        scores = case.scale * jnp.einsum("btkgh,bskh->bkgts", grouped, k)
        weights = jax.nn.softmax(jnp.where(mask[None, None, None], scores, -jnp.inf))
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)

    streaming_mask = masks.streaming(
        positions, positions, sink_size=case.sink, recent_size=case.recent
    )
    pairs = [
        (
            lambda q, k, v: streaming_attention(
                q, k, v, sink_size=case.sink, recent_size=case.recent, softmax_scale=case.scale
            ),
            lambda q, k, v: dense(q, k, v, streaming_mask),
        ),
        (
            lambda q, k, v: full_attention(q, k, v, softmax_scale=case.scale),
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
        streaming_attention(*draw(Case(length=3)), softmax_scale=1.0, **sizes)

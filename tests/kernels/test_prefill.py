"""A chunk of queries over cached keys against float64 numpy, at awkward lengths and offsets."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decode
from kernels import prefill as unjitted

prefill = jax.jit(unjitted, static_argnames="softmax_scale")

STALE = 1e4  # what a slot beyond a row's chunk may hold: anything finite, in float16 too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    length: int
    slots: int
    offsets: tuple[int, ...] = (0,)
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


SINK, RECENT = 4, 24
CASES = {
    "one token in one slot": Case(length=1, slots=1),
    "one token": Case(length=1, slots=40, offsets=(0, 39, 11)),
    "three tokens": Case(length=3, slots=40, offsets=(0, 37)),
    "sinks only, less one": Case(length=SINK - 1, slots=SINK, offsets=(0, 1)),
    "sink + recent": Case(length=SINK + RECENT, slots=60, offsets=(0, 28, 32)),
    "one past sink + recent": Case(length=SINK + RECENT + 1, slots=60, offsets=(0, 28, 31)),
    "odd length, group of 7": Case(length=97, slots=200, offsets=(3, 0), q_heads=14),
    "group of 1": Case(length=97, slots=97, q_heads=3, kv_heads=3),
    "group of 4, head_dim 64": Case(length=65, slots=97, offsets=(32,), q_heads=8, head_dim=64),
    "head_dim 80": Case(length=33, slots=97, offsets=(0, 60), head_dim=80),
    "head_dim 128": Case(length=33, slots=97, offsets=(0, 60), head_dim=128),
    "exactly one block of slots": Case(length=512, slots=512),
    "one slot past a block": Case(length=97, slots=513, offsets=(416, 415, 0)),
    "one slot past two blocks": Case(length=300, slots=1025, offsets=(725, 300, 0)),
    "far apart rows": Case(length=20, slots=1700, offsets=(0, 1680, 500)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def draw(case: Case, dtype=np.float32):
    """Return q, k, v and offsets; slots beyond a row's last query hold stale numbers."""
    rng = np.random.default_rng(0)
    batch = len(case.offsets)
    q = rng.standard_normal((batch, case.length, case.q_heads, case.head_dim))
    k, v = rng.standard_normal((2, batch, case.kv_heads, case.slots, case.head_dim))
    for row, offset in enumerate(case.offsets):
        k[row, :, offset + case.length :], v[row, :, offset + case.length :] = STALE, -STALE
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.array(case.offsets, jnp.int32)


def reference(q, k, v, offsets, *, scale):
    """Attend in float64, one query at a time, from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[1]
    out = np.empty_like(q)
    for row, t in np.ndindex(q.shape[:2]):
        end = int(offsets[row]) + t + 1
        keys, values = (np.repeat(x[row, :, :end], group, axis=0) for x in (k, v))
        scores = scale * np.einsum("nh,nsh->ns", q[row, t], keys)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[row, t] = np.einsum("ns,nsh->nh", weights, values)
    return out


@jax.jit
def _dense_by_head(q, k, v, offsets):
    grouped = q.reshape(*q.shape[:2], k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    positions = offsets[:, None] + jnp.arange(q.shape[1])[None]
    mask = jnp.arange(k.shape[2])[None, None] <= positions[..., None]
    scores = jnp.where(mask[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def dense(q, k, v, offsets):
    """Attend at once, rounding to the inputs' dtype where a plain XLA program would."""
    # The heads are moved outside of jit: XLA's CPU backend cannot run a bfloat16 product with a
    # float32 result that it has merged with a transpose.
    return jnp.moveaxis(_dense_by_head(q, k, v, offsets), 3, 1).reshape(q.shape)


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut queries into the smallest blocks, so that there are many of them."""
    jax.clear_caches()
    # The module, which the package hides behind its function.
    monkeypatch.setattr(sys.modules["kernels.prefill.xla"], "_SCORE_BYTES", 1)
    yield
    jax.clear_caches()


@every_case
def test_matches_float64(case):
    inputs = draw(case)
    out, _ = prefill(*inputs, softmax_scale=case.scale)
    assert out.dtype == jnp.float32
    expected = reference(*inputs, scale=case.scale)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["odd length, group of 7", "one slot past two blocks"])
def test_blocks_of_queries_do_not_change_the_result(name):
    case = CASES[name]
    inputs = draw(case)
    out, _ = prefill(*inputs, softmax_scale=case.scale)
    np.testing.assert_allclose(out, reference(*inputs, scale=case.scale), atol=2e-6, rtol=2e-5)


@pytest.mark.usefixtures("small_blocks")
def test_a_block_of_queries_reads_no_keys_beyond_its_diagonal():
    # A value that is read counts at least 0 * nan = nan.
    q, k, v, offsets = draw(Case(length=600, slots=1025))
    out, _ = prefill(q, k, v.at[:, :, 512:].set(jnp.nan), offsets, softmax_scale=0.25)
    expected = reference(q[:, :512], k, v, offsets, scale=0.25)
    np.testing.assert_allclose(out[:, :512], expected, atol=2e-6, rtol=2e-5)
    assert np.isnan(out[:, 512:]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["odd length, group of 7", "head_dim 80", "head_dim 128",
                                  "one slot past two blocks"])  # fmt: skip
def test_half_precision_errs_at_most_twice_as_much_as_the_dense_form(name, dtype):
    case = CASES[name]
    inputs = draw(case, dtype)
    out, _ = prefill(*inputs, softmax_scale=case.scale)
    assert out.dtype == dtype
    expected = reference(*inputs, scale=case.scale)

    def error(got):
        return np.abs(np.asarray(got, np.float64) - expected).max()

    assert error(out) <= 2 * error(dense(*inputs))


def test_float64_stays_float64():
    case = CASES["one slot past two blocks"]
    with jax.enable_x64(True):
        inputs = draw(case, np.float64)
        out, _ = prefill(*inputs, softmax_scale=case.scale)
        assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, reference(*inputs, scale=case.scale), atol=1e-13)


def test_each_query_gets_what_decode_gives_it():
    q, k, v, offsets = draw(CASES["one past sink + recent"])
    out, _ = prefill(q, k, v, offsets, softmax_scale=0.25)
    for t in (0, 1, 28):
        alone, _ = decode(q[:, t], k, v, offsets + t + 1, softmax_scale=0.25)
        np.testing.assert_allclose(out[:, t], alone, atol=2e-6)


def test_rows_do_not_see_each_other():
    q, k, v, offsets = draw(CASES["one slot past two blocks"])
    out, _ = prefill(q, k, v, offsets, softmax_scale=0.25)
    q, k, v = (x.at[1].set(jnp.nan) for x in (q, k, v))
    spoilt, _ = prefill(q, k, v, offsets, softmax_scale=0.25)
    assert np.isnan(spoilt[1]).all()
    for row in (0, 2):
        np.testing.assert_array_equal(spoilt[row], out[row])


def test_what_unfilled_slots_hold_changes_no_bit():
    case = Case(length=40, slots=1025, offsets=(700, 100, 0))
    q, k, v, offsets = draw(case)
    out, _ = prefill(q, k, v, offsets, softmax_scale=case.scale)
    ends = np.array(case.offsets)[:, None] + case.length
    unfilled = (np.arange(case.slots) >= ends)[:, None, :, None]
    for k_stale, v_stale in [(0.0, 0.0), (1e9, -1e30), (jnp.nan, 0.0), (jnp.inf, 0.0)]:
        stale = jnp.where(unfilled, k_stale, k), jnp.where(unfilled, v_stale, v)
        other, _ = prefill(q, *stale, offsets, softmax_scale=case.scale)
        np.testing.assert_array_equal(other, out)

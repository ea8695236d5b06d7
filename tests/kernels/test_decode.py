"""One query per row over cached keys against float64 numpy, at awkward lengths and slot counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decode as unjitted

decode = jax.jit(unjitted, static_argnames="softmax_scale")

STALE = 1e4  # what a slot beyond a row's length may hold: anything finite, in float16 too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    lengths: tuple[int, ...]
    slots: int
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


SINK, RECENT = 4, 24
CASES = {
    "one token in one slot": Case(lengths=(1,), slots=1),
    "one token": Case(lengths=(1,), slots=40),
    "three tokens": Case(lengths=(3,), slots=40),
    "around the ring's size": Case(lengths=(SINK - 1, SINK, 27, 28, 29), slots=40),
    "a ring, not yet and just filled": Case(lengths=(27, 28), slots=SINK + RECENT),
    "empty rows": Case(lengths=(0, 5, 0), slots=9),
    "only empty rows": Case(lengths=(0, 0), slots=9),
    "odd length, group of 7": Case(lengths=(97, 96), slots=97, q_heads=14, head_dim=8),
    "group of 1": Case(lengths=(97, 1), slots=97, q_heads=3, kv_heads=3),
    "group of 4, head_dim 64": Case(lengths=(97, 30), slots=128, q_heads=8, head_dim=64),
    "head_dim 80": Case(lengths=(65, 3), slots=70, head_dim=80),
    "head_dim 128": Case(lengths=(65, 3), slots=70, head_dim=128),
    "exactly one block": Case(lengths=(511, 512, 7), slots=512),
    "one slot past a block": Case(lengths=(511, 512, 513), slots=513),
    "one slot past two blocks": Case(lengths=(1023, 1024, 1025, 513, 0), slots=1025),
    "ragged rows in a full cache": Case(lengths=(1, 700, 1600, 512), slots=1700),
    "ragged rows in blocks of an empty cache": Case(lengths=(1, 700, 1600, 512, 0), slots=3300),
    "half full": Case(lengths=(1000, 3), slots=2000),
    "one token less than half full": Case(lengths=(999, 3), slots=2000),
    "one slot more than a block, nearly half full": Case(lengths=(256,), slots=513),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def draw(case: Case, dtype=np.float32, seed: int = 0):
    """Return q, k, v and lengths; slots beyond a row's length hold stale numbers."""
    rng = np.random.default_rng(seed)
    batch = len(case.lengths)
    q = rng.standard_normal((batch, case.q_heads, case.head_dim))
    k, v = rng.standard_normal((2, batch, case.kv_heads, case.slots, case.head_dim))
    for row, length in enumerate(case.lengths):
        k[row, :, length:], v[row, :, length:] = STALE, -STALE
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.array(case.lengths, jnp.int32)


def reference(q, k, v, lengths, *, scale):
    """Return output and lse in float64, row by row, from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for row, length in enumerate(np.asarray(lengths)):
        for head in range(q.shape[1] if length else 0):
            kv_head = head // (q.shape[1] // k.shape[1])
            scores = scale * k[row, kv_head, :length] @ q[row, head]
            lse[row, head] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            out[row, head] = np.exp(scores - lse[row, head]) @ v[row, kv_head, :length]
    return out, lse


@jax.jit
def dense(q, k, v, lengths):
    """Attend at once, rounding to the inputs' dtype where a plain XLA program would."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, k, preferred_element_type=jnp.float32)
    mask = jnp.arange(k.shape[2])[None] < lengths[:, None]
    scores = jnp.where(mask[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


@every_case
def test_output_and_lse_match_float64(case):
    inputs = draw(case)
    out, lse = decode(*inputs, softmax_scale=case.scale)
    expected_out, expected_lse = reference(*inputs, scale=case.scale)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(out, expected_out, atol=2e-6, rtol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "name",
    ["odd length, group of 7", "head_dim 128", "half full", "one token less than half full"],
)
def test_half_precision_errs_at_most_twice_as_much_as_the_dense_form(name, dtype):
    case = CASES[name]
    inputs = draw(case, dtype)
    out, lse = decode(*inputs, softmax_scale=case.scale)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    expected_out, expected_lse = reference(*inputs, scale=case.scale)

    def error(got):
        return np.abs(np.asarray(got, np.float64) - expected_out).max()

    assert error(out) <= 2 * error(dense(*inputs))
    # Products of two half-precision numbers are exact in float32, so lse is as good as ever.
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


def test_float64_stays_float64():
    case = CASES["one slot past two blocks"]
    with jax.enable_x64(True):
        inputs = draw(case, np.float64)
        out, lse = decode(*inputs, softmax_scale=case.scale)
        assert (out.dtype, lse.dtype) == (jnp.float64, jnp.float64)
        expected_out, expected_lse = reference(*inputs, scale=case.scale)
    np.testing.assert_allclose(out, expected_out, atol=1e-13)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-13)


@pytest.mark.parametrize("cut", [1, 97, 512, 600, 1024])
def test_parts_of_a_cache_merged_by_lse_give_the_whole(cut):
    q, k, v, lengths = draw(Case(lengths=(1025, 97, 1, 0), slots=1025))
    scale = q.shape[-1] ** -0.5
    whole, whole_lse = decode(q, k, v, lengths, softmax_scale=scale)
    first = jnp.minimum(lengths, cut)
    parts = [
        decode(q, k[:, :, :cut], v[:, :, :cut], first, softmax_scale=scale),
        decode(q, k[:, :, cut:], v[:, :, cut:], lengths - first, softmax_scale=scale),
    ]
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    lse = np.logaddexp(*lses)
    weights = np.exp(lses - np.where(np.isinf(lse), 0, lse))
    np.testing.assert_allclose(lse, whole_lse, atol=2e-6)
    np.testing.assert_allclose((weights[..., None] * outs).sum(0), whole, atol=2e-6)


def test_the_order_of_slots_does_not_matter():
    q, k, v, lengths = draw(Case(lengths=(700, 600), slots=700))
    order = np.concatenate([np.random.default_rng(1).permutation(600), np.arange(600, 700)])
    out, lse = decode(q, k, v, lengths, softmax_scale=0.25)
    shuffled = decode(q, k[:, :, order], v[:, :, order], lengths, softmax_scale=0.25)
    np.testing.assert_allclose(shuffled[0], out, atol=2e-6)
    np.testing.assert_allclose(shuffled[1], lse, atol=2e-6)


def test_rows_do_not_see_each_other():
    q, k, v, lengths = draw(Case(lengths=(600, 1000, 3), slots=1025))
    out, lse = decode(q, k, v, lengths, softmax_scale=0.25)
    q, k, v = (x.at[1].set(jnp.nan) for x in (q, k, v))
    spoilt_out, spoilt_lse = decode(q, k, v, lengths, softmax_scale=0.25)
    assert np.isnan(spoilt_out[1]).all()
    for row in (0, 2):
        np.testing.assert_array_equal(spoilt_out[row], out[row])
        np.testing.assert_array_equal(spoilt_lse[row], lse[row])


def test_what_unfilled_slots_hold_changes_no_bit():
    case = Case(lengths=(600, 512, 0), slots=1025)
    q, k, v, lengths = draw(case)
    out, lse = decode(q, k, v, lengths, softmax_scale=case.scale)
    unfilled = (np.arange(case.slots) >= np.array(case.lengths)[:, None])[:, None, :, None]
    for k_stale, v_stale in [(0.0, 0.0), (1e9, -1e30), (jnp.nan, 0.0), (jnp.inf, 0.0)]:
        stale = jnp.where(unfilled, k_stale, k), jnp.where(unfilled, v_stale, v)
        other_out, other_lse = decode(q, *stale, lengths, softmax_scale=case.scale)
        np.testing.assert_array_equal(other_out, out)
        np.testing.assert_array_equal(other_lse, lse)


def test_blocks_beyond_the_longest_row_are_not_read():
    # A value that is read counts at least 0 * nan = nan.
    q, k, v, lengths = draw(Case(lengths=(512, 30), slots=2000))
    out, _ = decode(q, k, v.at[:, :, 512:].set(jnp.nan), lengths, softmax_scale=0.25)
    np.testing.assert_array_equal(out, decode(q, k, v, lengths, softmax_scale=0.25)[0])


@pytest.mark.parametrize("size", [1e3, 1e-3])
def test_scores_of_any_size_neither_overflow_nor_vanish(size):
    q, k, v, lengths = draw(CASES["one slot past two blocks"])
    out, lse = decode(q * size, k, v, lengths, softmax_scale=1.0)
    expected_out, expected_lse = reference(q * size, k, v, lengths, scale=1.0)
    np.testing.assert_allclose(out, expected_out, atol=2e-3 if size > 1 else 2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6)

"""Properties of any input: tiles and splits, rows, stale slots, dtypes, vmap, retracing."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import address_limit
from kernels.all_cases import CASES
from kernels.decode.cases import DecodeCase
from kernels.prefill.cases import PrefillCase
from kernels.streaming import cases as streaming
from kernels.tiles import AttentionTiles, DecodeTiles

DECODE = DecodeCase(
    lengths=(97, 1, 0), slots=130, q_heads=4, kv_heads=2, head_dim=16, dtype="float32"
)
PREFILL = PrefillCase(
    starts=(5, 0), length=33, slots=70, q_heads=4, kv_heads=2, head_dim=16, dtype="float32"
)
# Several of XLA's blocks, and three rows.
LONG = {
    "decode": dataclasses.replace(DECODE, lengths=(600, 1000, 3), slots=1025),
    "prefill": dataclasses.replace(PREFILL, starts=(700, 100, 0), length=40, slots=1025),
    "chunk": streaming.AWKWARD["chunk one past sink + recent"],
}
every_long_case = pytest.mark.parametrize("case", LONG.values(), ids=LONG.keys())


def run(case, arguments, tiles=None, implementation="interpret"):
    call = functools.partial(case.run, implementation=implementation, tiles=tiles)
    return jax.jit(call)(*arguments)


def assert_close(results, wanted, *, atol=5e-6, rtol=2e-5):
    for got, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=atol, rtol=rtol)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("block_kv", "num_splits"),
    [
        pytest.param(block_kv, number, marks=[pytest.mark.slow] * (block_kv != quick))
        for number, quick in {1: 16, 2: 64, 3: 16, 50: 64}.items()
        for block_kv in (16, 64)
    ],
)
def test_any_splits_and_tiles_give_the_same_decode(num_splits, block_kv):
    arguments = DECODE.draw()
    tiles = DecodeTiles(block_kv=block_kv, num_splits=num_splits, num_warps=4, num_stages=1)
    assert_close(run(DECODE, arguments, tiles), DECODE.expected(arguments))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("block_q", "block_kv"), [(16, 16), (16, 64), (64, 16)])
def test_any_tiles_give_the_same_prefill(block_q, block_kv):
    arguments = PREFILL.draw()
    tiles = AttentionTiles(block_q=block_q, block_kv=block_kv, num_warps=4, num_stages=1)
    assert_close(run(PREFILL, arguments, tiles), PREFILL.expected(arguments))


@pytest.mark.one_in(3)
@every_long_case
def test_rows_do_not_see_each_other(case):
    arguments = case.draw()
    results = run(case, arguments, implementation="xla")
    spoilt = jax.tree.map(
        lambda x: x.at[1].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments
    )
    for got, before in zip(run(case, spoilt, implementation="xla"), results, strict=True):
        assert np.isnan(got[1]).all()
        for row in (0, 2):
            np.testing.assert_array_equal(got[row], before[row])


@pytest.mark.one_in(5)
@every_long_case
@pytest.mark.parametrize("keys", [0.0, 1e9, jnp.nan, jnp.inf])
def test_what_unseen_slots_hold_changes_no_bit(case, keys):
    arguments = case.draw()
    stale = case.with_stale(arguments, keys=keys, values=-1e30 if keys == 1e9 else 0.0)
    stale = jax.tree.map(jnp.asarray, stale)
    pairs = zip(*map(jax.tree.leaves, (arguments, stale)), strict=True)
    assert any(not jnp.array_equal(x, y) for x, y in pairs)
    results = [run(case, x, implementation="xla") for x in (arguments, stale)]
    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.one_in(3)
@every_long_case
def test_float64_stays_float64(case):
    with jax.enable_x64(True):
        case = dataclasses.replace(case, dtype="float64")
        arguments = case.draw()
        results = run(case, arguments, implementation="xla")
        assert {x.dtype for x in results} == {jnp.dtype(jnp.float64)}
        assert_close(results, case.expected(arguments), atol=1e-13, rtol=1e-13)


def test_kernels_can_be_vmapped():
    drawn = [DECODE.draw(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
    call = jax.jit(jax.vmap(functools.partial(DECODE.run, implementation="interpret")))
    results = call(*stacked)
    for index, arguments in enumerate(drawn):
        assert_close([x[index] for x in results], DECODE.expected(arguments))


GRADIENT = CASES["streaming"]["gradient, three tokens"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", [DECODE, PREFILL, GRADIENT], ids=["decode", "prefill", "gradient"])
@pytest.mark.parametrize("inner", [(), (64,)], ids=["once", "twice"])
def test_batches_that_no_kernel_can_address_are_refused(case, inner):
    """By their shapes: nothing is allocated."""
    call = functools.partial(case.run, implementation="interpret")
    for _ in range(1 + len(inner)):
        call = jax.vmap(call)

    def evaluate(size: int):
        batch = (size, *inner)
        jax.eval_shape(call, *jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*batch, *x.shape), x.dtype), case.shapes()
        ))  # fmt: skip

    largest = max(math.prod((*inner, *x.shape)) for x in jax.tree.leaves(case.shapes()))
    most = address_limit.MAX_ELEMENTS // largest
    evaluate(most)
    with pytest.raises(NotImplementedError, match=r"^under jax.vmap, an array of shape .* end at"):
        evaluate(most + 1)


@pytest.mark.parametrize(
    ("case", "field", "values"),
    [(DECODE, "lengths", [(97, 1, 0), (3, 130, 64)]), (PREFILL, "starts", [(5, 0), (0, 37)]),
     (dataclasses.replace(CASES["streaming"]["a chunk shorter than the window"], dtype="float32"),
      "lengths", [(150, 12), (0, 3)])],
    ids=["decode", "prefill", "streaming"],
)  # fmt: skip
def test_lengths_and_starts_are_run_time_values(case, field, values):
    traces = []

    @jax.jit
    def call(*arguments):
        traces.append(field)
        return case.run(*arguments, implementation="interpret")

    for value in values:
        other = dataclasses.replace(case, **{field: value})
        arguments = other.draw()
        assert_close(call(*arguments), other.expected(arguments))
    assert len(traces) == 1

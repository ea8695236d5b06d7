"""What holds for any input: splits and tiles change nothing, vmap works, lengths do not retrace."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import offsets
from kernels.all_cases import CASES
from kernels.decode.cases import DecodeCase
from kernels.decode.config import BlockSizes
from kernels.prefill.cases import PrefillCase
from kernels.prefill.config import BlockSizes as PrefillBlockSizes
from tests.kernels import oracle

DECODE = DecodeCase(
    lengths=(97, 1, 0), slots=130, q_heads=4, kv_heads=2, head_dim=16, dtype="float32"
)
PREFILL = PrefillCase(
    offsets=(5, 0), length=33, slots=70, q_heads=4, kv_heads=2, head_dim=16, dtype="float32"
)


def run(case, arguments, block_sizes=None):
    call = functools.partial(case.run, implementation="interpret", block_sizes=block_sizes)
    return jax.jit(call)(*arguments)


def assert_close(results, wanted):
    for got, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 50])
@pytest.mark.parametrize("block_kv", [16, 64])
def test_any_splits_and_tiles_give_the_same_decode(num_splits, block_kv):
    arguments = oracle.draw(DECODE)
    sizes = BlockSizes(block_kv=block_kv, num_splits=num_splits, num_warps=4, num_stages=1)
    assert_close(run(DECODE, arguments, sizes), oracle.expected(DECODE, arguments))


@pytest.mark.parametrize(("block_q", "block_kv"), [(16, 16), (16, 64), (64, 16)])
def test_any_tiles_give_the_same_prefill(block_q, block_kv):
    arguments = oracle.draw(PREFILL)
    sizes = PrefillBlockSizes(block_q=block_q, block_kv=block_kv, num_warps=4, num_stages=1)
    assert_close(run(PREFILL, arguments, sizes), oracle.expected(PREFILL, arguments))


def test_kernels_can_be_vmapped():
    drawn = [oracle.draw(DECODE, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
    call = jax.jit(jax.vmap(functools.partial(DECODE.run, implementation="interpret")))
    results = call(*stacked)
    for index, arguments in enumerate(drawn):
        assert_close([x[index] for x in results], oracle.expected(DECODE, arguments))


GRADIENT = CASES["streaming"]["gradient, three tokens"]


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
    most = offsets.MAX_ELEMENTS // largest
    evaluate(most)
    with pytest.raises(NotImplementedError, match=r"^under jax.vmap, an array of shape .* end at"):
        evaluate(most + 1)


@pytest.mark.parametrize(
    ("case", "field", "values"),
    [(DECODE, "lengths", [(97, 1, 0), (3, 130, 64)]), (PREFILL, "offsets", [(5, 0), (0, 37)]),
     (dataclasses.replace(CASES["streaming"]["a chunk shorter than the window"], dtype="float32"),
      "lengths", [(150, 12), (0, 3)])],
    ids=["decode", "prefill", "streaming"],
)  # fmt: skip
def test_lengths_and_offsets_are_run_time_values(case, field, values):
    traces = []

    @jax.jit
    def call(*arguments):
        traces.append(field)
        return case.run(*arguments, implementation="interpret")

    for value in values:
        other = dataclasses.replace(case, **{field: value})
        arguments = oracle.draw(other)
        assert_close(call(*arguments), oracle.expected(other, arguments))
    assert len(traces) == 1

"""Gates in the order of scores, and a warm start's numbers."""

import numpy as np
import pytest

from duo_jax.heads.pattern import choose_retrieval_heads
from train.ranking import gates_of_ranking, standardised

SCORES = np.array([[3e9, -1.0, 0.0], [1e-30, -1e9, 2.0]])


@pytest.mark.parametrize("kept", range(7))
def test_as_many_gates_as_asked_are_above_half_in_the_order_of_the_scores(kept):
    gates = gates_of_ranking(SCORES, kept=kept)
    assert (gates > 0.5).sum() == kept
    assert gates.min() >= 0
    assert gates.max() <= 1
    np.testing.assert_array_equal(np.argsort(gates, axis=None), np.argsort(SCORES, axis=None))
    for sparsity in np.linspace(0, 1, 7):
        chosen = choose_retrieval_heads(gates, sparsity=float(sparsity))
        assert SCORES[chosen].min(initial=np.inf) > SCORES[~chosen].max(initial=-np.inf)


def test_equal_scores_are_ranked_by_position_as_in_a_pattern():
    gates = gates_of_ranking(np.zeros((2, 3)), kept=2)
    assert (np.diff(gates.ravel()) < 0).all()
    np.testing.assert_array_equal(gates > 0.5, choose_retrieval_heads(gates, sparsity=2 / 3))


def test_a_warm_start_reads_the_order_alone():
    numbers = standardised(SCORES)
    np.testing.assert_allclose([numbers.mean(), numbers.std()], [0, 1], atol=1e-12)
    np.testing.assert_array_equal(np.argsort(numbers, axis=None), np.argsort(SCORES, axis=None))
    np.testing.assert_array_equal(numbers, standardised(np.cbrt(SCORES)))
    np.testing.assert_array_equal(standardised(np.ones((1, 1))), 0)

"""Means and their errors."""

import math

import numpy as np

from duo_jax.reports import statistics


def test_errors_are_two_standard_errors_of_the_mean():
    values = np.array([0.1, 0.2, 0.6])
    error = values.std(ddof=1) / math.sqrt(3)
    assert statistics.standard_error(values) == error
    assert statistics.nats(values) == f"0.300 ± {2 * error:.3f}"
    assert statistics.percent(values) == f"30.0% ± {200 * error:.1f}"
    assert statistics.change(-values) == f"-0.300 ± {2 * error:.3f}"


def test_of_one_sample_the_error_is_not_known():
    one = np.array([0.25])
    assert math.isnan(statistics.standard_error(one))
    assert [f(one) for f in (statistics.nats, statistics.percent, statistics.change)] == [
        "0.250",
        "25.0%",
        "+0.250",
    ]

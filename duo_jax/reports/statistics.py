"""Errors of measured means."""

import math

import numpy as np
from jaxtyping import Shaped


def standard_error(samples: Shaped[np.ndarray, " samples"]) -> float:
    """Return the standard error of the mean of independent samples; nan, not known, for one."""
    if len(samples) < 2:
        return math.nan
    return float(np.std(samples, ddof=1) / np.sqrt(len(samples)))


def percent(samples: Shaped[np.ndarray, " samples"]) -> str:
    """Return the mean of fractions and two standard errors, in per cent and points."""
    return with_error(f"{np.mean(samples):.1%}", 200 * standard_error(samples), digits=1)


def nats(samples: Shaped[np.ndarray, " samples"]) -> str:
    """Return the mean of likelihoods or divergences and two standard errors, in nats."""
    return with_error(f"{np.mean(samples):.3f}", 2 * standard_error(samples))


def change(differences: Shaped[np.ndarray, " samples"]) -> str:
    """Return the mean of differences in nats, with its sign, and two standard errors."""
    return with_error(f"{np.mean(differences):+.3f}", 2 * standard_error(differences))


def with_error(mean: str, error: float, *, digits: int = 3) -> str:
    """Return a mean and its error, or the mean alone where the error is not known."""
    return mean if math.isnan(error) else f"{mean} ± {error:.{digits}f}"

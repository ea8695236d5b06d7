"""Errors of measured means."""

import numpy as np
from jaxtyping import Shaped


def standard_error(samples: Shaped[np.ndarray, " samples"]) -> float:
    """Return the standard error of the mean of independent samples; 0 for a single one."""
    if len(samples) < 2:
        return 0.0
    return float(np.std(samples, ddof=1) / np.sqrt(len(samples)))


def percent(samples: Shaped[np.ndarray, " samples"]) -> str:
    """Return the mean of fractions and two standard errors, in per cent and points."""
    return f"{np.mean(samples):.1%} ± {200 * standard_error(samples):.1f}"


def nats(samples: Shaped[np.ndarray, " samples"]) -> str:
    """Return the mean of likelihoods or divergences and two standard errors, in nats."""
    return f"{np.mean(samples):.3f} ± {2 * standard_error(samples):.3f}"

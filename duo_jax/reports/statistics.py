"""Errors of measured means."""

import numpy as np
from jaxtyping import Shaped


def standard_error(samples: Shaped[np.ndarray, " samples"]) -> float:
    """Return the standard error of the mean of independent samples; 0 for a single one."""
    if len(samples) < 2:
        return 0.0
    return float(np.std(samples, ddof=1) / np.sqrt(len(samples)))

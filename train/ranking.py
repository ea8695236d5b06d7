"""Gates that say no more than an order of heads, and how many of them to keep.

Scores of some methods differ by orders of magnitude, or are negative, or equal in float32 once they
are squeezed into [0, 1]; a pattern file holds numbers in [0, 1], and is served by their order.
"""

import numpy as np
from jaxtyping import Float


def gates_of_ranking(
    scores: Float[np.ndarray, "layers kv_heads"], *, kept: int
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return gates in the order of the scores: `kept` of them above 0.5, evenly spaced to 1.

    The others are evenly spaced from 0 to below 0.5. Equal scores are ranked by layer, then head.
    """
    order = np.argsort(-scores, axis=None, kind="stable")
    gates = np.empty(scores.size)
    gates[order[:kept]] = np.linspace(1.0, 0.5, kept, endpoint=False)
    gates[order[kept:]] = np.linspace(0.0, 0.5, scores.size - kept, endpoint=False)[::-1]
    return gates.reshape(scores.shape)


def standardised(
    gates: Float[np.ndarray, "layers kv_heads"],
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return numbers of mean 0 and deviation 1 in the order of the gates, evenly spaced."""
    places = -np.argsort(np.argsort(-gates, axis=None, kind="stable")).astype(np.float64)
    return ((places - places.mean()) / max(places.std(), 1e-9)).reshape(gates.shape)

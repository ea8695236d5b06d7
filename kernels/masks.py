"""Which keys a query may see: the one place that says so, for every head and every kernel."""

import numpy as np
from jaxtyping import Array, Bool, Int

Positions = Array | np.ndarray  # numpy for numpy


def causal(
    q_positions: Int[Positions, " q_len"], kv_positions: Int[Positions, " kv_len"]
) -> Bool[Positions, "q_len kv_len"]:
    """Return which keys a retrieval head lets each query see: key j for query i iff j <= i.

    Positions are absolute. With five tokens:

             j: 0 1 2 3 4
        i = 0:  1 0 0 0 0
        i = 1:  1 1 0 0 0
        i = 2:  1 1 1 0 0
        i = 3:  1 1 1 1 0
        i = 4:  1 1 1 1 1
    """
    return causal_pairs(q_positions[:, None], kv_positions[None, :])


def causal_pairs(
    q_positions: Int[Positions, "*#pairs"], kv_positions: Int[Positions, "*#pairs"]
) -> Bool[Positions, "*pairs"]:
    """Return for pairs of a query and a key whether a retrieval head lets it see the key."""
    return kv_positions <= q_positions


def streaming(
    q_positions: Int[Positions, " q_len"],
    kv_positions: Int[Positions, " kv_len"],
    *,
    sink_size: int,
    recent_size: int,
) -> Bool[Positions, "q_len kv_len"]:
    """Return which keys a streaming head lets each query see (DuoAttention, section 2).

    Key j is visible to query i iff j <= i and (j < sink_size or i - j < recent_size); the recent
    tokens count the query's own. With sink_size=1, recent_size=2 and five tokens:

             j: 0 1 2 3 4
        i = 0:  1 0 0 0 0
        i = 1:  1 1 0 0 0
        i = 2:  1 1 1 0 0
        i = 3:  1 0 1 1 0
        i = 4:  1 0 0 1 1
    """
    sizes = {"sink_size": sink_size, "recent_size": recent_size}
    return streaming_pairs(q_positions[:, None], kv_positions[None, :], **sizes)


def streaming_pairs(
    q_positions: Int[Positions, "*#pairs"],
    kv_positions: Int[Positions, "*#pairs"],
    *,
    sink_size: int,
    recent_size: int,
) -> Bool[Positions, "*pairs"]:
    """Return for pairs of a query and a key whether a streaming head lets it see the key."""
    i, j = q_positions, kv_positions
    return causal_pairs(i, j) & ((j < sink_size) | (i - j < recent_size))

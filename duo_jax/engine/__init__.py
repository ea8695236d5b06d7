"""Many requests through one split model, at the same time."""

from duo_jax.engine.engine import Engine, Stats
from duo_jax.engine.request import (
    DrainingError,
    QueueFullError,
    Request,
    TokenFilter,
    TokenLogprob,
    Update,
)

__all__ = [
    "DrainingError",
    "Engine",
    "QueueFullError",
    "Request",
    "Stats",
    "TokenFilter",
    "TokenLogprob",
    "Update",
]

"""Serving a split model with pure functions: (params, cache, tokens) -> (logits, cache)."""

from duo_jax.serve.attention import PrefillMode
from duo_jax.serve.forward import decode, hidden_states, logits, prefill
from duo_jax.serve.votes import Voters

__all__ = ["PrefillMode", "Voters", "decode", "hidden_states", "logits", "prefill"]

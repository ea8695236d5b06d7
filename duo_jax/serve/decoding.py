"""The decode loop: one jitted lax.while_loop from token to token, sampling included.

A host may run the loop to its end in one call, or in segments, to show text as it appears: a state
goes in, tokens and a state come out. The tokens are the same.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from duo_jax import serve
from duo_jax.cache import Cache
from duo_jax.heads.split import DuoConfig
from duo_jax.model.llama import Params
from duo_jax.serve import sampling
from kernels import Implementation, pytree


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """State of every row of a batch between two tokens."""

    cache: Cache
    last: Int[Array, " batch"]  # each row's latest token; not in the cache yet
    stopped: Bool[Array, " batch"]  # rows ended by a stop token or by the host
    rng_keys: Key[Array, " batch"]  # one per row; a token's draw also depends on its position
    seen: Bool[Array, "batch vocab"] | None  # tokens of prompt and output; only with a penalty


def row_rng_keys(seed: int, batch_size: int) -> Key[Array, " batch"]:
    """Return a random key per row, so that rows draw independently of each other."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        jnp.arange(batch_size)
    )


@functools.partial(jax.jit, donate_argnames=("cache", "seen"))
def begin(
    cache: Cache,
    logits: Float[Array, "batch vocab"],
    rng_keys: Key[Array, " batch"],
    seen: Bool[Array, "batch vocab"] | None,
    options: Mapping[str, Array],
    stop_tokens: Int[Array, " stops"],
) -> DecodeState:
    """Sample every row's first token from the logits after its prompt."""
    state = DecodeState(
        cache=cache,
        last=jnp.zeros(logits.shape[0], jnp.int32),
        stopped=jnp.zeros(logits.shape[0], bool),
        rng_keys=rng_keys,
        seen=seen,
    )
    return _next_token(state, logits, options, stop_tokens, active=~state.stopped)


@functools.partial(
    jax.jit, static_argnames=("config", "size", "implementation"), donate_argnames="state"
)
def decode_segment(
    config: DuoConfig,
    params: Params,
    state: DecodeState,
    options: Mapping[str, Array],
    stop_tokens: Int[Array, " stops"],
    limits: Int[Array, " batch"],
    *,
    size: int,
    implementation: Implementation = "auto",
) -> tuple[DecodeState, Int[Array, "batch size"], Int[Array, " batch"]]:
    """Decode until every row has stopped or has `limits[b]` new tokens.

    Args:
      config: the split model.
      params: its parameters.
      state: from `begin` or the previous segment; donated.
      options: from `sampling.SamplingConfig.options`.
      stop_tokens: tokens that end a row; they are part of the output.
      limits: new tokens per row, at most `size`; run-time values.
      size: length of the output, static.
      implementation: attention implementation, see kernels.dispatch.

    Returns:
      The state after the segment, the new tokens of every row (padded with 0), and how many each
      row has.
    """
    batch = state.last.shape[0]

    def active(state: DecodeState, counts: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        return ~state.stopped & (counts < limits)

    def step(carry):
        state, tokens, counts = carry
        running = active(state, counts)
        logits, cache = serve.decode(
            config, params, state.cache, state.last, running, implementation=implementation
        )
        state = dataclasses.replace(state, cache=cache)
        state = _next_token(state, logits, options, stop_tokens, active=running)
        # A row that does not run writes past the buffer: the write is dropped.
        at = jnp.where(running, counts, size)
        tokens = tokens.at[jnp.arange(batch), at].set(state.last, mode="drop")
        return state, tokens, counts + running.astype(counts.dtype)

    tokens = jnp.zeros((batch, size), jnp.int32)
    counts = jnp.zeros(batch, jnp.int32)
    return jax.lax.while_loop(
        lambda carry: jnp.any(active(carry[0], carry[2])), step, (state, tokens, counts)
    )


def _next_token(
    state: DecodeState,
    logits: Float[Array, "batch vocab"],
    options: Mapping[str, Array],
    stop_tokens: Int[Array, " stops"],
    *,
    active: Bool[Array, " batch"],
) -> DecodeState:
    """Sample the next token of the active rows; the others stay as they are."""
    rng_keys = jax.vmap(jax.random.fold_in)(state.rng_keys, state.cache.lengths)
    token = sampling.sample(logits, options, rng_keys, state.seen).astype(jnp.int32)
    token = jnp.where(active, token, state.last)
    seen = state.seen
    if seen is not None:
        seen = sampling.mark_seen(seen, token[:, None], active[:, None])
    stops = jnp.any(token[:, None] == stop_tokens[None, :], axis=1)
    return dataclasses.replace(
        state, last=token, stopped=state.stopped | (active & stops), seen=seen
    )

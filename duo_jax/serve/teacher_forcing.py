"""Teacher forcing: decode tokens that are given, and keep something of what follows from each."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from duo_jax.cache import Cache
from duo_jax.heads.split import DuoConfig
from duo_jax.model.llama import Params
from duo_jax.serve.forward import hidden_states
from kernels import Implementation

State = TypeVar("State")  # what a step reads and changes, such as a cache
Tokens = Int[Array, " batch"]
Active = Bool[Array, " batch"]
Output = Float[Array, "batch channels"]  # logits, or residual streams


def decode_given(
    step: Callable[[State, Tokens, Active], tuple[Output, State]],
    state: State,
    tokens: Int[Array, "batch length"],
    active: Bool[Array, "batch length"],
    *,
    keep: Callable[[Output, Int[Array, ""]], PyTree[Shaped[Array, "batch ..."]]],
) -> tuple[PyTree[Shaped[Array, "batch length ..."]], State]:
    """Decode tokens one by one, whatever the model would have written.

    Args:
      step: appends a token to every active row; returns its output and the new state.
      state: before the first token.
      tokens: the tokens of each row.
      active: which of them are appended; the loop ends after the last one of any row.
      keep: maps the output for the tokens at index t, and t, to what is kept of it.

    Returns:
      What was kept at each index (zeros where the loop had ended, anything where a row was not
      active), and the state after all tokens.
    """

    def body(t, carry):
        kept, state = carry
        output, state = step(state, tokens[:, t], active[:, t])
        write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=t, axis=1)
        return jax.tree.map(write, kept, keep(output, t)), state

    def first(state, tokens, active):
        return keep(step(state, tokens[:, 0], active[:, 0])[0], jnp.array(0))

    shapes = jax.eval_shape(first, state, tokens, active)
    batch, length = tokens.shape
    kept = jax.tree.map(lambda x: jnp.zeros((batch, length, *x.shape[1:]), x.dtype), shapes)
    ends = jnp.where(jnp.any(active, axis=0), jnp.arange(1, length + 1), 0)
    return jax.lax.fori_loop(0, jnp.max(ends), body, (kept, state))


@functools.partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache")
def decode_tokens(
    config: DuoConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "batch length"],
    active: Bool[Array, "batch length"],
    *,
    implementation: Implementation,
) -> tuple[Float[Array, "batch length embed"], Cache]:
    """Decode given tokens from the caches that serve a split model.

    Args:
      config: the split model.
      params: its parameters.
      cache: what came before; donated.
      tokens: the tokens of each row.
      active: which of them are appended.
      implementation: attention implementation, see kernels.dispatch.

    Returns:
      The residual stream after each token, as in `decode_given` (`serve.logits` makes logits of
      it), and the cache.
    """

    def step(cache, tokens, active):
        x, cache = hidden_states(
            config,
            params,
            cache,
            tokens[:, None],
            active.astype(jnp.int32),
            implementation=implementation,
        )
        return x[:, 0], cache

    return decode_given(step, cache, tokens, active, keep=lambda x, _: x)

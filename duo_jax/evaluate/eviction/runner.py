"""Answer questions from an evicting cache: read, evict, then the true tokens one by one."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from duo_jax.evaluate.eviction.cache import Pool, Prompt, compress
from duo_jax.evaluate.eviction.decode import decode
from duo_jax.evaluate.eviction.policy import Budget, Policy, Rereads
from duo_jax.evaluate.eviction.prompt import read_with
from duo_jax.evaluate.results.forced import Forced, pad
from duo_jax.heads.split import DuoConfig
from duo_jax.model.llama import Params
from duo_jax.serve.teacher_forcing import decode_given
from duo_jax.session.runtime import Runtime


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Predicted:
    """What predicts the tails of texts, and the bytes of the cache."""

    forced: Forced
    cache_bytes: int  # of one row's live buffers
    # Bytes of the tokens of the text that are kept, mean over rows; for caches that evict.
    text_bytes: float | None = None
    host_bytes: int = 0  # of one row, in the memory of the host


def predict(
    runtime: Runtime,
    policy: Policy,
    texts: Sequence[Int[np.ndarray, "_"]],
    tails: Sequence[Int[np.ndarray, "_"]],
    *,
    slots: int,
    length: int,
    room: int,
) -> Predicted:
    """Read texts, evict, and decode the tails, each token after the true ones before it.

    Args:
      runtime: a model whose heads are all retrieval heads.
      policy: the eviction method.
      texts: rows of tokens to compress.
      tails: the tokens after them.
      slots: slots of a row's buffers, over all heads.
      length: to pad texts to; another length is another compilation.
      room: to pad tails to.
    """
    padded, lengths = pad(texts, length)
    given, counts = pad(tails, room)
    prompt = read_with(runtime, padded, lengths, window=policy.window)
    if isinstance(policy, Rereads):
        scores = policy.reread(runtime, padded, lengths)
        prompt = dataclasses.replace(prompt, received=scores)
    first = np.asarray(prompt.logits)
    # The last token of a tail is predicted, not given.
    pool, state = _evict(policy, prompt, budget=Budget(slots=slots, room=room))
    del prompt
    cache_bytes, text_bytes = pool.live_bytes(), float(pool.held_bytes().mean())
    active = jnp.arange(room)[None, :] < counts[:, None] - 1
    rest = _decode(runtime.config, runtime.params, policy, pool, state, given, active)
    return Predicted(
        forced=Forced(first=first, rest=np.asarray(rest)[:, :-1]),
        cache_bytes=cache_bytes // len(texts),
        text_bytes=text_bytes,
    )


@functools.partial(jax.jit, static_argnames=("policy", "budget"))
def _evict(policy: Policy, prompt: Prompt, *, budget: Budget) -> tuple[Pool, Any]:
    chosen = policy.select(prompt, budget)
    longest = policy.longest(prompt, budget)
    slots = min(budget.slots, longest * chosen.sizes[0].size)
    pool = compress(prompt, chosen.kept, chosen.sizes, slots=slots, longest=longest)
    return pool, chosen.state


@functools.partial(jax.jit, static_argnames=("config", "policy"))
def _decode(
    config: DuoConfig,
    params: Params,
    policy: Policy,
    pool: Pool,
    state: Any,
    tokens: Int[Array, "batch length"],
    active: Bool[Array, "batch length"],
) -> Float[Array, "batch length embed"]:
    """Decode the given tokens one by one; return the residual stream after each."""

    def step(
        pool: Pool, tokens: Int[Array, " batch"], active: Bool[Array, " batch"]
    ) -> tuple[Float[Array, "batch embed"], Pool]:
        return decode(config, params, policy, pool, state, tokens, active)

    streams, _ = decode_given(step, pool, tokens, active, keep=lambda x, _: x)
    return streams

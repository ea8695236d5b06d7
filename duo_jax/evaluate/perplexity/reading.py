"""How well each token of a text is predicted, read through the caches that serve the model."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from duo_jax import serve
from duo_jax.cache import init_cache, live_bytes
from duo_jax.model.token_scores import check_finite, score_streams
from duo_jax.session.limits import Limits
from duo_jax.session.runtime import Runtime

_read = jax.jit(
    serve.hidden_states,
    static_argnames=("config", "mode", "implementation"),
    donate_argnames="cache",
)


def read(
    runtime: Runtime, tokens: Int[np.ndarray, " length"]
) -> tuple[Float[np.ndarray, " rest"], int]:
    """Read a text in chunks, as a prompt is read.

    With prefill mode "exact" and any chunk these are the numbers of reading token by token.

    Args:
      runtime: the model.
      tokens: the text, 2 tokens or more.

    Returns:
      Minus the log-probability of every token but the first, in nats; and the bytes of the cache.

    Raises:
      InputError: they are no numbers.
    """
    size = tokens.size
    width = min(runtime.prefill_chunk, size)
    cache = init_cache(
        runtime.config,
        batch_size=1,
        max_len=Limits(architecture=runtime.config.architecture, max_len=None).capacity(size),
        dtype=runtime.dtype,
        kv=runtime.kv_format,
        mesh=runtime.mesh,
    )
    parts = []
    for start in range(0, size, width):
        given, following = (_part(tokens, at, width) for at in (start, start + 1))
        x, cache = _read(
            runtime.config,
            runtime.params,
            cache,
            given,
            jnp.array([min(width, size - start)], jnp.int32),
            mode=runtime.prefill_mode,
            implementation=runtime.implementation,
            total_lengths=jnp.array([size], jnp.int32),
        )
        scores = score_streams(runtime.config.architecture, runtime.params, x, following)
        parts.append(np.asarray(scores.nll[0]))
    nll = np.concatenate(parts)[: size - 1]
    check_finite(nll)
    return nll, live_bytes(cache)


def _part(tokens: Int[np.ndarray, " length"], start: int, width: int) -> Int[jax.Array, "1 width"]:
    part = tokens[start : start + width]
    return jnp.asarray(np.pad(part, (0, width - part.size))[None])

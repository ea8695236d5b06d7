"""Answer questions from a compressed cache: read, compress, then the true tokens one by one."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from duo_jax.evaluate.compression.method import Compressed, Compression, New
from duo_jax.evaluate.eviction.decode import through_layers
from duo_jax.evaluate.eviction.prompt import read_with
from duo_jax.evaluate.eviction.runner import Predicted
from duo_jax.evaluate.results.forced import Forced, pad
from duo_jax.heads.split import DuoConfig
from duo_jax.model.llama import Params
from duo_jax.serve.teacher_forcing import decode_given
from duo_jax.session.runtime import Runtime


def predict(
    runtime: Runtime,
    method: Compression,
    texts: Sequence[Int[np.ndarray, "_"]],
    tails: Sequence[Int[np.ndarray, "_"]],
    *,
    length: int,
    room: int,
) -> Predicted:
    """Read texts, compress, and decode the tails, each token after the true ones before it.

    Args:
      runtime: a model whose heads are all retrieval heads.
      method: the method and its setting.
      texts: rows of tokens to compress.
      tails: the tokens after them.
      length: to pad texts to; another length is another compilation.
      room: to pad tails to.
    """
    padded, lengths = pad(texts, length)
    given, counts = pad(tails, room)
    prompt = read_with(runtime, padded, lengths, window=method.window, noting=method)
    first = np.asarray(prompt.logits)
    cache = method.compress(runtime.config.architecture, prompt, room=room)
    del prompt
    cache_bytes, host_bytes = (n // len(texts) for n in (cache.live_bytes(), cache.host_bytes()))
    # The last token of a tail is predicted, not given.
    active = jnp.arange(room)[None, :] < counts[:, None] - 1
    rest = _decode(runtime.config, runtime.params, method, cache, given, active)
    forced = Forced(first=first, rest=np.asarray(rest)[:, :-1])
    return Predicted(forced=forced, cache_bytes=cache_bytes, host_bytes=host_bytes)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def _decode(
    config: DuoConfig,
    params: Params,
    method: Compression,
    cache: Compressed,
    tokens: Int[Array, "batch length"],
    active: Bool[Array, "batch length"],
) -> Float[Array, "batch length embed"]:
    """Decode the given tokens one by one; return the residual stream after each."""
    step = functools.partial(_step, config, params, method)
    return decode_given(step, cache, tokens, active, keep=lambda x, _: x)[0]


def _step(
    config: DuoConfig,
    params: Params,
    method: Compression,
    cache: Compressed,
    tokens: Int[Array, " batch"],
    active: Bool[Array, " batch"],
) -> tuple[Float[Array, "batch embed"], Compressed]:
    """Append one token to every active row; return the residual stream after it."""

    def attend(
        index: int,
        q: Float[Array, "batch q_heads head_dim"],
        k: Float[Array, "batch kv_heads head_dim"],
        v: Float[Array, "batch kv_heads head_dim"],
        cache: Compressed,
    ) -> tuple[Float[Array, "batch 1 q_heads head_dim"], Compressed]:
        batch, kv_heads, head_dim = k.shape
        new = New(q=q.reshape(batch, kv_heads, -1, head_dim), k=k, v=v, active=active)
        out, cache = method.attend(config.architecture, cache, index, new)
        return out.reshape(batch, 1, -1, head_dim), cache

    x, cache = through_layers(config, params, attend, cache, cache.lengths, tokens, active)
    return x, dataclasses.replace(cache, lengths=cache.lengths + active.astype(jnp.int32))

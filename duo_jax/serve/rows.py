"""Programs of an engine: requests come and go in the rows of a paged cache (duo_jax.cache.pages).

The host keeps lengths and page tables, and hands them to every program; the layers of the cache are
donated and updated in place. A prompt is read into one row at a time. Decoding takes the first
rows, as many as its program was made for; rows that are not active keep their cache.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from duo_jax import cache as caches
from duo_jax.cache import Cache, pages
from duo_jax.cache.pages import Layers
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh.devices import AnyMesh
from duo_jax.model.llama import Params
from duo_jax.serve import forward
from kernels import Implementation
from kernels.pages import Pages
from kernels.precision import accumulator

_PLACES = 64  # whose logits exist at a time, where those of all places are looked at

copy_row = jax.jit(pages.copy_row, donate_argnums=0)
copy_page = jax.jit(pages.copy_page, donate_argnums=0)
clear_row = jax.jit(pages.clear_row, donate_argnums=0)
clear_page = jax.jit(pages.clear_page, donate_argnums=0)


@functools.partial(
    jax.jit, static_argnames=("config", "implementation", "mesh"), donate_argnames="layers"
)
def decode_rows(
    config: DuoConfig,
    params: Params,
    layers: Layers,
    tokens: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    active: Bool[Array, " batch"],
    table: Pages,
    *,
    implementation: Implementation,
    mesh: AnyMesh | None = None,
) -> tuple[Float[Array, "batch vocab"], Layers]:
    """Append a token to each of the first rows that is active.

    Args:
      config: the split model.
      params: its parameters.
      layers: pools of pages, and rings of at least as many rows; donated.
      tokens: one per row.
      lengths: tokens before these.
      active: rows that get their token.
      table: the rows' pages, with room for it.
      implementation: attention implementation, see kernels.dispatch.
      mesh: the devices that share the layers, if there are several.

    Returns:
      Logits after each token, undefined for rows that are not active; and the layers.
    """
    # With all rows of the rings: where the first ones are cut out and put back, XLA may copy all.
    cache = caches.Cache(layers=layers, lengths=lengths, kept=lengths, pages=table, mesh=mesh)
    logits, cache = forward.decode(
        config, params, cache, tokens, active, implementation=implementation
    )
    return logits, cache.layers


@functools.partial(
    jax.jit, static_argnames=("config", "implementation", "mesh"), donate_argnames="layers"
)
def prefill_row(
    config: DuoConfig,
    params: Params,
    layers: Layers,
    row: Int[Array, ""],
    tokens: Int[Array, "1 length"],
    num_tokens: Int[Array, " 1"],
    lengths: Int[Array, " 1"],
    total_lengths: Int[Array, " 1"],
    table: Pages,
    *,
    implementation: Implementation,
    mesh: AnyMesh | None = None,
) -> tuple[Float[Array, "1 vocab"], Layers]:
    """Append a chunk of tokens to one row.

    Args:
      config: the split model.
      params: its parameters.
      layers: pools of pages, and rings; donated.
      row: of the rings.
      tokens: the chunk; beyond num_tokens it is padding.
      num_tokens: tokens of the chunk.
      lengths: tokens before the chunk.
      total_lengths: tokens of the whole prompt, as in duo_jax.serve.prefill.
      table: the row's pages, with room for the chunk.
      implementation: attention implementation, see kernels.dispatch.
      mesh: the devices that share the layers, if there are several.

    Returns:
      Logits after the last token, and the layers.
    """
    cache = _rows(layers, row, lengths, table, mesh)
    logits, cache = forward.prefill(
        config,
        params,
        cache,
        tokens,
        num_tokens,
        total_lengths=total_lengths,
        implementation=implementation,
    )
    return logits, pages.put_rows(layers, cache.layers, row)


@functools.partial(
    jax.jit, static_argnames=("config", "most", "implementation", "mesh"), donate_argnames="layers"
)
def prefill_row_scored(
    config: DuoConfig,
    params: Params,
    layers: Layers,
    row: Int[Array, ""],
    tokens: Int[Array, "1 length"],
    num_tokens: Int[Array, " 1"],
    lengths: Int[Array, " 1"],
    total_lengths: Int[Array, " 1"],
    table: Pages,
    targets: Int[Array, "1 length"],
    *,
    most: int,
    implementation: Implementation,
    mesh: AnyMesh | None = None,
) -> tuple[
    Float[Array, "1 vocab"],
    tuple[Float[Array, "length"], Float[Array, "length most"], Int[Array, "length most"]],
    Layers,
]:
    """Do what `prefill_row` does, and score the token that follows each of the chunk's.

    Args:
      config: as there.
      params: as there.
      layers: as there.
      row: as there.
      tokens: as there.
      num_tokens: as there.
      lengths: as there.
      total_lengths: as there.
      table: as there.
      targets: the following tokens.
      most: how many of the most likely tokens are told at every place.
      implementation: as there.
      mesh: as there.

    Returns:
      Logits after the last token; log-probabilities of the following tokens, those of the most
      likely ones, and which these are; and the layers.
    """
    cache = _rows(layers, row, lengths, table, mesh)
    x, cache = forward.hidden_states(
        config,
        params,
        cache,
        tokens,
        num_tokens,
        total_lengths=total_lengths,
        implementation=implementation,
    )
    length = tokens.shape[1]
    padding = -length % _PLACES
    blocks = jnp.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(-1, 1, _PLACES, x.shape[-1])
    follow = jnp.pad(targets, ((0, 0), (0, padding))).reshape(-1, _PLACES)

    def score(block):
        x, follow = block
        return token_logprobs(forward.logits(config, params, x)[0], follow, most=most)

    scores = jax.lax.map(score, (blocks, follow))
    flat = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:length], scores)
    last = jnp.take_along_axis(x, (num_tokens - 1)[:, None, None], axis=1)
    logits = forward.logits(config, params, last)[:, 0]
    return logits, flat, pages.put_rows(layers, cache.layers, row)


def token_logprobs(
    logits: Float[Array, "batch vocab"], tokens: Int[Array, " batch"], *, most: int
) -> tuple[Float[Array, " batch"], Float[Array, "batch most"], Int[Array, "batch most"]]:
    """Return log-probabilities of tokens and of the most likely ones, and which these are."""
    log_p = jax.nn.log_softmax(logits.astype(accumulator(logits.dtype)))
    top, which = jax.lax.top_k(log_p, most)
    return jnp.take_along_axis(log_p, tokens[:, None], axis=1)[:, 0], top, which


def _rows(
    layers: Layers,
    first: Int[Array, ""] | int,
    lengths: Array,
    table: Pages,
    mesh: AnyMesh | None,
) -> Cache:
    """Return the cache of some rows, from `first` on."""
    some = pages.take_rows(layers, first, lengths.shape[0])
    return caches.Cache(layers=some, lengths=lengths, kept=lengths, pages=table, mesh=mesh)

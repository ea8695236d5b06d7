"""ThinK: keys without the channels that the queries hardly use.

Xu et al., "ThinK: Thinner Key Cache by Query-Driven Pruning", arXiv 2407.21018, section 3; public
code https://github.com/SalesforceAIResearch/ThinK. Channel c of a head's keys K changes the scores
of the queries Q by at most the Frobenius norm of Q[:, c] K[:, c]^T, which is |Q[:, c]| |K[:, c]|.
The channels with the smallest norm are left out of all keys but those of the latest tokens and of
what is written; queries leave them out too. Q: the last 32 queries, the latest 32 tokens stay whole
(public code: observation window 32, recent_size 32). Values stay as they are, so no more than half
of the bytes can be saved; the paper prunes 40% of the channels, on top of SnapKV.

Budget: first channels, as few as needed and at most 40%; then tokens, by SnapKV.

GQA: the public code repeats keys for every query head; here Q holds the queries of a group.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from duo_jax.evaluate.compression import method
from duo_jax.evaluate.compression.method import Compressed, New, Part, Shape
from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.evaluate.eviction.policy import highest
from duo_jax.evaluate.eviction.snapkv import window_votes
from duo_jax.model.config import ModelConfig

RATIO = 0.4  # of the channels
_WINDOW = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinK:
    """ThinK with a setting; the module's docstring describes it."""

    name: ClassVar[str] = "ThinK"
    pruned: int  # channels of each head's keys
    tokens: int  # of the text, that each head keeps
    window: int = _WINDOW
    kernel: int = 7  # of SnapKV

    @classmethod
    def fitting(cls, shape: Shape, budget: float) -> "ThinK | str":
        """Return the largest setting within a budget, or what takes more."""
        most = int(RATIO * shape.head_dim)
        settings = [(pruned, shape.length) for pruned in range(most + 1)]
        settings += [(most, tokens) for tokens in range(shape.length - 1, 0, -1)]
        for pruned, tokens in settings:
            whole = min(_WINDOW, tokens)
            numbers = (tokens + shape.room) * 2 * shape.head_dim - (tokens - whole) * pruned
            if numbers <= shape.numbers(budget):
                return cls(pruned=pruned, tokens=tokens)
        return f"what is asked and answered takes more ({shape.room} tokens)"

    def note(
        self,
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch kv_heads head_dim"]:
        """Return the squared norm of each channel of the last queries."""
        position = jnp.arange(q.shape[1])[None]
        last = (position >= (lengths - self.window)[:, None]) & (position < lengths[:, None])
        squares = jnp.sum(jnp.square(q), axis=1, where=last[:, :, None, None], dtype=jnp.float32)
        return squares.reshape(q.shape[0], k.shape[2], -1, q.shape[3]).sum(axis=2)

    def compress(self, architecture: ModelConfig, prompt: Prompt, *, room: int) -> Compressed:
        """Choose tokens and channels."""
        del architecture
        return _compress(self, prompt, room=room)

    def channels(
        self, queries: Float[Array, "*heads head_dim"], keys: Float[Array, "*heads slots head_dim"]
    ) -> Int[Array, "*heads kept"]:
        """Return the channels that stay, in order.

        Args:
          queries: squared norms of their channels.
          keys: 0 where there is none.
        """
        norms = queries * jnp.sum(jnp.square(keys), axis=-2, dtype=jnp.float32)
        kept = highest(norms, norms.shape[-1] - self.pruned)
        order = jnp.argsort(~kept, axis=-1, stable=True)
        return order[..., : norms.shape[-1] - self.pruned].astype(jnp.int32)

    def attend(
        self, architecture: ModelConfig, cache: Compressed, layer: int, new: New
    ) -> tuple[Float[Array, "batch kv_heads group head_dim"], Compressed]:
        """Attend to thin keys without the pruned channels of the query, and to the others."""
        del architecture
        cache, tail = method.append_written(cache, layer, new)
        channels, thin, whole = (x[:, layer] for x in cache.beside)
        held = {name: x[:, layer] for name, x in cache.counted.items()}
        q = jnp.take_along_axis(new.q, channels[:, :, None], axis=-1)
        parts = [
            Part(q, held["thin_keys"], held["thin_values"], thin),
            Part(new.q, held["whole_keys"], held["whole_values"], whole),
            tail,
        ]
        return method.attention(parts, head_dim=new.q.shape[-1]), cache


@functools.partial(jax.jit, static_argnames=("think", "room"))
def _compress(think: ThinK, prompt: Prompt, *, room: int) -> Compressed:
    shape = prompt.received.shape
    count = min(think.tokens, shape[-1])
    votes = window_votes(prompt, window=think.window, kernel=think.kernel, count=count)
    kept = highest(votes, count)
    position = jnp.arange(shape[-1])[None]
    size = min(think.window, think.tokens)
    latest = kept & (position >= (prompt.lengths - size)[:, None])[:, None, None]
    parts = {"thin": (kept & ~latest, think.tokens - size), "whole": (latest, size)}
    counted, exists = method.room_for_written(prompt, room), {}
    for name, (mask, number) in parts.items():
        order = jnp.argsort(~mask, axis=-1, stable=True)[..., :number]
        exists[name] = method.first(jnp.sum(mask, axis=-1), number)
        for kind, all_ in (("keys", prompt.keys), ("values", prompt.values)):
            found = jnp.take_along_axis(all_, order[..., None], axis=3)
            counted[f"{name}_{kind}"] = jnp.where(exists[name][..., None], found, 0)
    all_keys = jnp.concatenate([counted["thin_keys"], counted["whole_keys"]], axis=3)
    channels = think.channels(prompt.noted, all_keys)
    counted["thin_keys"] = jnp.take_along_axis(
        counted["thin_keys"], channels[:, :, :, None], axis=-1
    )
    return Compressed(
        counted=counted,
        beside=(channels, exists["thin"], exists["whole"]),
        starts=prompt.lengths,
        lengths=prompt.lengths,
    )

"""ShadowKV: keys at low rank, values on the host, and few tokens fetched for each query.

Sun et al., "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference", arXiv
2410.21465, section 4; public code https://github.com/bytedance/ShadowKV (models/kv_cache.py). On
the device stay:

    keys before their rotation, of all heads of a layer together, at low rank
    whole keys and values of the last 4 chunks of 8 tokens, and of outliers: the chunks whose keys
      are least like their mean
    of every other chunk a landmark, the mean of its rotated keys
    whole keys and values of what is written
    buffers for the chunks that a query chooses, those whose landmarks it looks at most: keys are
      made from the low rank, values come from the host

The paper's sizes for 8 KV heads of 128 channels and 128K tokens are rank 160, 48 outliers and 2,048
fetched tokens. Rank and outliers are scaled to the model's channels and the text's length.

Budget: the rest of the bytes goes into fetched chunks. Bytes are those of the device; the values of
the whole text, which the host holds, are counted apart (`Compressed.host_bytes`). Here they lie in
an array beside the cache: nothing is moved, so this measures accuracy and bytes, not speed.

GQA: as in the public code, a head's group chooses by its highest attention to a landmark.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from duo_jax.evaluate.compression import method
from duo_jax.evaluate.compression.method import Compressed, New, Part, Shape
from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.evaluate.eviction.policy import highest
from duo_jax.model import rope
from duo_jax.model.config import ModelConfig
from kernels.precision import accumulator

CHUNK = 8  # tokens
_LOCAL = 4  # chunks
_RANK = 160 / 1024  # of a layer's channels
_OUTLIERS = 48 / (131_072 // CHUNK)  # of the chunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShadowKV:
    """ShadowKV with a setting; the module's docstring describes it."""

    name: ClassVar[str] = "ShadowKV"
    rank: int
    outliers: int  # chunks
    fetched: int  # chunks
    local: int = _LOCAL  # chunks
    window: int | None = 1  # what the prompt's queries look at plays no part

    @classmethod
    def fitting(cls, shape: Shape, budget: float) -> "ShadowKV | str":
        """Return the largest setting within a budget, or what takes more."""
        if budget >= 1.0:  # all of it on the device as it is
            return cls(rank=0, outliers=0, fetched=0, local=-(-shape.length // CHUNK))
        chunks = shape.length // CHUNK
        sizes = {
            "rank": round(_RANK * shape.kv_heads * shape.head_dim) or 1,
            "outliers": round(_OUTLIERS * chunks) or 1,
        }
        free = shape.numbers(budget) - cls(**sizes, fetched=0).numbers(shape)
        fetched = min(int(free // (2 * CHUNK * shape.head_dim)), chunks)
        if fetched < 1:
            return "low-rank keys, landmarks and a fetched chunk take more"
        return cls(**sizes, fetched=fetched)

    def numbers(self, shape: Shape) -> float:
        """Return the numbers on the device, for each KV head."""
        whole = self.whole(shape.length) + shape.room
        chunks = self.landmarks(shape.length)
        channels = shape.kv_heads * shape.head_dim
        low_rank = self.rank * (shape.length + channels) / shape.kv_heads if chunks else 0
        return (2 * (whole + self.fetched * CHUNK) + chunks) * shape.head_dim + low_rank

    def whole(self, length: int) -> int:
        """Return the slots for tokens of a text that are kept as they are."""
        return min((self.local + self.outliers + 1) * CHUNK - 1, length)

    def landmarks(self, length: int) -> int:
        """Return the most chunks that have a landmark."""
        return max(length // CHUNK - self.local - self.outliers, 0)

    def note(
        self,
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch 0"]:
        """Return nothing: keys and values are enough."""
        del k, lengths
        return jnp.zeros((q.shape[0], 0), jnp.float32)

    def compress(self, architecture: ModelConfig, prompt: Prompt, *, room: int) -> Compressed:
        """Find outliers, landmarks and the low rank."""
        return _compress(self, architecture, prompt, room=room)

    def attend(
        self, architecture: ModelConfig, cache: Compressed, layer: int, new: New
    ) -> tuple[Float[Array, "batch kv_heads group head_dim"], Compressed]:
        """Fetch chunks, and attend to them and to what is there as it is."""
        cache, tail = method.append_written(cache, layer, new)
        held = {name: x[:, layer] for name, x in cache.counted.items()}
        whole, chunk_of = (x[:, layer] for x in cache.beside)
        parts = [Part(new.q, held["whole_keys"], held["whole_values"], whole), tail]
        if held["landmarks"].shape[2]:
            chunks, exists = self._choose(new.q, held["landmarks"], chunk_of)
            offsets = jnp.arange(CHUNK)[None, None, None]
            place = (chunks[..., None] * CHUNK + offsets).reshape(*chunks.shape[:2], -1)
            exists = jnp.repeat(exists, CHUNK, axis=-1)
            values = jnp.take_along_axis(
                cache.on_host["values"][:, layer], place[..., None], axis=2
            )
            keys = _low_rank_keys(architecture, held, place, cache.starts)
            fetched = {"fetched_keys": keys, "fetched_values": values}
            after = {name: cache.counted[name].at[:, layer].set(x) for name, x in fetched.items()}
            cache = dataclasses.replace(cache, counted={**cache.counted, **after})
            parts.append(Part(new.q, keys, values, exists))
        return method.attention(parts, head_dim=new.q.shape[-1]), cache

    def _choose(
        self,
        q: Float[Array, "batch kv_heads group head_dim"],
        landmarks: Float[Array, "batch kv_heads chunks head_dim"],
        chunk_of: Int[Array, "batch kv_heads chunks"],
    ) -> tuple[Int[Array, "batch kv_heads fetched"], Bool[Array, "batch kv_heads fetched"]]:
        """Return the chunks that a query looks at most, and which of them there are."""
        wide = accumulator(q.dtype)
        scores = jnp.einsum("bkgh,bkch->bkgc", q, landmarks, preferred_element_type=wide)
        exists = chunk_of >= 0
        scores = jnp.where(exists[:, :, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
        looked_at = jnp.max(jax.nn.softmax(scores, axis=-1), axis=2)
        looked_at = jnp.where(exists, looked_at, -1.0)  # also where a row has no chunks: nan
        number = min(self.fetched, landmarks.shape[2])
        _, best = jax.lax.top_k(looked_at, number)
        chosen = jnp.take_along_axis(chunk_of, best, axis=-1)
        more = ((0, 0), (0, 0), (0, self.fetched - number))
        chosen = jnp.pad(chosen, more, constant_values=-1)
        return jnp.maximum(chosen, 0), chosen >= 0


def _low_rank_keys(
    architecture: ModelConfig,
    held: dict[str, Float[Array, "batch ..."]],
    place: Int[Array, "batch kv_heads fetched"],
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch kv_heads fetched head_dim"]:
    """Make the keys of some positions, and rotate them."""
    batch, kv_heads, fetched = place.shape
    rows = jnp.arange(batch)[:, None, None]
    keys = jnp.einsum("bksr,bkrh->bksh", held["left"][rows, place], held["right"])
    cos, sin = rope.rotation(architecture, place.reshape(batch, -1), total_length=lengths)
    flat = keys.reshape(batch, kv_heads * fetched, 1, -1)
    return rope.rotate(flat, cos, sin).reshape(keys.shape)


@functools.partial(jax.jit, static_argnames=("shadow", "architecture", "room"))
def _compress(
    shadow: ShadowKV, architecture: ModelConfig, prompt: Prompt, *, room: int
) -> Compressed:
    batch, layers, kv_heads, length, head_dim = prompt.keys.shape
    number, before = length // CHUNK, prompt.lengths // CHUNK - shadow.local  # of whole chunks
    in_chunks = prompt.keys[:, :, :, : number * CHUNK].reshape(
        batch, layers, kv_heads, number, CHUNK, head_dim
    )
    means = jnp.mean(in_chunks, axis=4)
    alike = jnp.min(_cosine(in_chunks, means[..., None, :]), axis=-1)
    compressed = jnp.arange(number)[None, None, None] < before[:, None, None, None]
    outlier = highest(jnp.where(compressed, -alike, -jnp.inf), shadow.outliers)
    rest = compressed & ~outlier

    position = jnp.arange(length)
    chunk = jnp.minimum(position // CHUNK, max(number - 1, 0))
    local = (position[None] >= (before * CHUNK)[:, None])[:, None, None]
    whole = (local | (outlier[..., chunk] if number else False)) & prompt.exists
    slots, chunks = shadow.whole(length), shadow.landmarks(length)
    order = jnp.argsort(~whole, axis=-1, stable=True)[..., :slots]
    exists = method.first(jnp.sum(whole, axis=-1), slots)
    chunk_of = jnp.argsort(~rest, axis=-1, stable=True)[..., :chunks].astype(jnp.int32)
    left, right = _factors(shadow, architecture, prompt)
    counted = method.room_for_written(prompt, room) | {
        "landmarks": jnp.take_along_axis(means, chunk_of[..., None], axis=3),
        "left": left,
        "right": right,
    }
    for kind, all_ in (("keys", prompt.keys), ("values", prompt.values)):
        found = jnp.take_along_axis(all_, order[..., None], axis=3)
        counted[f"whole_{kind}"] = jnp.where(exists[..., None], found, 0)
        shape = (batch, layers, kv_heads, shadow.fetched * CHUNK if chunks else 0, head_dim)
        counted[f"fetched_{kind}"] = jnp.zeros(shape, all_.dtype)
    chunk_of = jnp.where(method.first(jnp.sum(rest, axis=-1), chunks), chunk_of, -1)
    return Compressed(
        counted=counted,
        beside=(exists, chunk_of),
        on_host={"values": prompt.values} if chunks else {},
        starts=prompt.lengths,
        lengths=prompt.lengths,
    )


def _cosine(
    a: Float[Array, "*axes head_dim"], b: Float[Array, "*#axes head_dim"]
) -> Float[Array, "*axes"]:
    def norm(x: Float[Array, "*shape head_dim"]) -> Float[Array, "*shape"]:
        return jnp.maximum(jnp.linalg.norm(x.astype(jnp.float32), axis=-1), 1e-8)

    return jnp.sum(a * b, axis=-1, dtype=jnp.float32) / (norm(a) * norm(b))


def _factors(
    shadow: ShadowKV, architecture: ModelConfig, prompt: Prompt
) -> tuple[
    Float[Array, "batch layers length rank"], Float[Array, "batch layers kv_heads rank head_dim"]
]:
    """Return the best low-rank product of each layer's keys, before their rotation.

    The keys K [length, channels] times the first eigenvectors of K^T K, and these: the same product
    as from the singular value decomposition.
    """
    batch, layers, kv_heads, length, head_dim = prompt.keys.shape
    rank = shadow.rank if shadow.landmarks(length) else 0
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    cos, sin = rope.rotation(architecture, positions, total_length=prompt.lengths)
    scale = jnp.mean(jnp.square(cos) + jnp.square(sin))  # 1, or YaRN's factor, squared
    by_token = jnp.moveaxis(prompt.keys, 3, 1).reshape(batch, length, -1, head_dim)
    plain = rope.rotate(by_token.astype(jnp.float32), cos, -sin) / scale
    plain = jnp.where(prompt.exists[:, 0, 0, :, None, None], plain, 0)
    plain = jnp.moveaxis(plain.reshape(batch, length, layers, -1), 1, 2)
    gram = jnp.einsum("blsc,blsd->blcd", plain, plain, preferred_element_type=jnp.float32)
    vectors = jnp.linalg.eigh(gram)[1][..., kv_heads * head_dim - rank :]
    left = jnp.einsum("blsc,blcr->blsr", plain, vectors)
    right = jnp.swapaxes(vectors, -1, -2).reshape(batch, layers, rank, kv_heads, head_dim)
    dtype = prompt.keys.dtype
    return left.astype(dtype), jnp.moveaxis(right, 3, 2).astype(dtype)

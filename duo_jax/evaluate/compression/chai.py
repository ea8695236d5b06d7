"""CHAI: heads that look at the same tokens share one head's keys.

Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference", arXiv 2403.08058,
section 3; public code https://github.com/facebookresearch/chai. Offline: how much is lost with how
many clusters of heads, for each layer. Online: the attention among a text's first five tokens says
which heads belong together (the public code's agglomerative clustering: average linkage of cosine
distances); of a cluster's heads only the first one's queries and keys are used, and its attention
serves them all. Every head keeps its values, so no more than half of the bytes can be saved.

Budget: the number of clusters in all layers together. Where the paper reads each layer's number off
the elbow of its curve, here clusters go where the curves say that they are worth most.

As for the other methods, prompts are read with every head's own attention; the public code clusters
from the sixth token on.

GQA: KV heads are clustered, by the attention of all query heads of their groups; the group of a
cluster's first head serves the others', query head by query head.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.cluster import hierarchy
from scipy.spatial import distance

from duo_jax.evaluate.compression import method
from duo_jax.evaluate.compression.method import Compressed, New, Part, Shape
from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.model.config import ModelConfig
from kernels import masks

FIRST = 5  # tokens whose attention is compared

Features = Float[np.ndarray, "heads features"]
Losses = Float[np.ndarray, "layers kv_heads"]  # with 1, 2, ... clusters


@dataclasses.dataclass(frozen=True, kw_only=True)
class CHAI:
    """CHAI with a setting; the module's docstring describes it."""

    name: ClassVar[str] = "CHAI"
    clusters: tuple[int, ...]  # of every layer
    window: int | None = 1  # what the prompt's queries look at later plays no part

    @classmethod
    def fitting(cls, shape: Shape, budget: float, losses: Losses) -> "CHAI | str":
        """Return the largest setting within a budget, or what takes more."""
        heads = shape.layers * shape.kv_heads
        total = int(2 * budget * heads + 1e-6) - heads
        if total < shape.layers:
            return "the values and one head's keys of every layer take more"
        return cls(clusters=share_out(losses, total))

    def note(
        self,
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch kv_heads features"]:
        """Return the attention among the first tokens."""
        del lengths
        q, k = q[:, :FIRST], k[:, :FIRST]
        batch, size, kv_heads, head_dim = k.shape
        grouped = q.reshape(batch, size, kv_heads, -1, head_dim)
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k).astype(jnp.float32)
        visible = jnp.asarray(masks.causal(np.arange(size), np.arange(size)))
        scores = jnp.where(visible[None, None, None], scores * head_dim**-0.5, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1).reshape(batch, kv_heads, -1)

    def compress(self, architecture: ModelConfig, prompt: Prompt, *, room: int) -> Compressed:
        """Cluster the heads of every text and layer; keep the keys of the first of each cluster."""
        del architecture
        batch, layers, kv_heads = prompt.keys.shape[:3]
        noted = np.asarray(prompt.noted)
        member = np.zeros((batch, layers, kv_heads), np.int32)  # a head's cluster
        firsts = np.zeros((batch, sum(self.clusters)), np.int32)  # a cluster's head
        for row in range(batch):
            found = [cluster(noted[row, i], self.clusters[i]) for i in range(layers)]
            member[row] = np.stack(found)
            firsts[row] = np.concatenate([_firsts(labels) for labels in found])
        layer_of = np.repeat(np.arange(layers), self.clusters)
        pad = ((0, 0), (0, 0), (0, room), (0, 0))
        keys = prompt.keys[np.arange(batch)[:, None], layer_of[None], firsts]
        return Compressed(
            counted={"keys": jnp.pad(keys, pad), "values": jnp.pad(prompt.values, ((0, 0), *pad))},
            beside=(jnp.asarray(member), jnp.asarray(firsts)),
            starts=prompt.lengths,
            lengths=prompt.lengths,
        )

    def attend(
        self, architecture: ModelConfig, cache: Compressed, layer: int, new: New
    ) -> tuple[Float[Array, "batch kv_heads group head_dim"], Compressed]:
        """Attend with the first head of every cluster, to every head's values."""
        del architecture
        member, firsts = cache.beside
        begin = sum(self.clusters[:layer])
        own = slice(begin, begin + self.clusters[layer])
        q, k = (_rows(x, firsts[:, own]) for x in (new.q, new.k))
        keys, values = cache.counted["keys"], cache.counted["values"]
        place = (cache.lengths, new.active)
        of_layer = method.append(keys[:, None, own], 0, k, *place)
        keys = keys.at[:, own].set(of_layer[:, 0])
        values = method.append(values, layer, new.v, *place)
        exists = jnp.arange(keys.shape[2])[None] <= cache.lengths[:, None]
        # One cluster's queries and keys, once more for each of its heads.
        q, seen = (_rows(x, member[:, layer]) for x in (q, of_layer[:, 0]))
        part = Part(q, seen, values[:, layer], exists[:, None])
        out = method.attention([part], head_dim=new.q.shape[-1])
        return out, dataclasses.replace(cache, counted={"keys": keys, "values": values})


def _rows(
    x: Float[Array, "batch heads ..."], index: Int[Array, "batch chosen"]
) -> Float[Array, "batch chosen ..."]:
    """Return some heads of every row."""
    return x[jnp.arange(x.shape[0])[:, None], index]


def cluster(features: Features, number: int) -> Int[np.ndarray, " heads"]:
    """Return the cluster of each head; clusters are numbered by their first heads."""
    if number == len(features):
        return np.arange(number, dtype=np.int32)
    labels = hierarchy.cut_tree(_tree(features), n_clusters=number)[:, 0]
    _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[inverse].astype(np.int32)


def losses(texts: Float[np.ndarray, "texts layers kv_heads features"]) -> Losses:
    """Return what is lost with 1, 2, ... clusters: heads' distances to their clusters' first.

    Args:
      texts: what `CHAI.note` notes of texts.
    """
    curves = []
    for layers in texts:
        of_text = np.zeros(layers.shape[:2])
        for index, features in enumerate(layers):
            far = distance.squareform(distance.pdist(features, "cosine"))
            for number in range(1, len(features)):
                labels = cluster(features, number)
                firsts = _firsts(labels)[labels]
                of_text[index, number - 1] = far[np.arange(len(features)), firsts].sum()
        curves.append(of_text)
    return np.mean(curves, axis=0)


def share_out(losses: Losses, total: int) -> tuple[int, ...]:
    """Return the clusters of every layer: from all heads down, merging where it costs least."""
    layers, kv_heads = losses.shape
    clusters = [kv_heads] * layers
    while sum(clusters) > total:
        costs = [
            losses[i, number - 2] - losses[i, number - 1] if number > 1 else np.inf
            for i, number in enumerate(clusters)
        ]
        clusters[int(np.argmin(costs))] -= 1
    return tuple(clusters)


def _firsts(labels: Int[np.ndarray, " heads"]) -> Int[np.ndarray, " clusters"]:
    return np.unique(labels, return_index=True)[1].astype(np.int32)


def _tree(features: Features) -> Float[np.ndarray, "merges 4"]:
    distances = np.maximum(distance.pdist(features.astype(np.float64), "cosine"), 0.0)
    return hierarchy.linkage(distances, "average")

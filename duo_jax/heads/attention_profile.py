"""The attention profile: retrieval heads found without training, as heads that look far back.

The model runs once over each sample, with full attention. Let A be the positions whose next token
is part of an answer, and a[i, t, j] the attention of query head i from position t to j <= t:

    score of KV head k = max over the query heads i of k of
        mean over samples, mean over t in A of
        sum over j with j >= sink and t - j >= recent of a[i, t, j]

This is the attention that a streaming head would lose where it matters: the attention profiling
that DuoAttention compares with (section 3.5), on DuoAttention's own calibration samples.

Why everything far away, and not only the passkey, as in retrieval scores (Wu et al., 2404.15574): a
look-up may need heads that read other places, such as the previous answers. A demo model had such a
head. Attention to passkeys scored it near 0, and without it over a third of the passkeys were lost;
this score kept it. Why at answers: in ordinary text many heads look far back without need. No
profile sees whether the attention changes anything; the learned gates do.

Why the maximum over the query heads of a group: one that retrieves is enough for the KV head to
need every token, and a mean would hide it among the others.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from duo_jax.data.passkeys import Sample
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import Implementation, masks
from kernels.precision import accumulator

# Queries whose scores are computed together: 0.3 GB for 32 query heads at 32,000 tokens.
_BLOCK = 64


def attention_profile(
    architecture: ModelConfig,
    params: llama.Params,
    samples: Sequence[Sample],
    *,
    sink_size: int,
    recent_size: int,
    implementation: Implementation = "auto",
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return how much of its attention each KV head pays to what a streaming head cannot see.

    Args:
      architecture: the model.
      params: its parameters, as duo_jax.model.llama takes them.
      samples: texts with passkeys; all are padded to the longest.
      sink_size: first tokens that a streaming head sees.
      recent_size: latest tokens that it sees.
      implementation: attention implementation, see kernels.dispatch.

    Returns:
      Scores in [0, 1]; the higher, the more of a retrieval head.
    """
    length = max(sample.tokens.size for sample in samples)
    profiles = [
        sample_profile(
            architecture,
            params,
            sample,
            length=length,
            sink_size=sink_size,
            recent_size=recent_size,
            implementation=implementation,
        )
        for sample in samples
    ]
    return kv_scores(architecture, np.mean(profiles, axis=0))


def sample_profile(
    architecture: ModelConfig,
    params: llama.Params,
    sample: Sample,
    *,
    length: int,
    sink_size: int,
    recent_size: int,
    implementation: Implementation = "auto",
) -> Float[np.ndarray, "layers q_heads"]:
    """Return one sample's part of the score, for every query head.

    Args:
      architecture: the model.
      params: its parameters.
      sample: a text with passkeys.
      length: length it is padded to; each length is compiled for.
      sink_size: first tokens that a streaming head sees.
      recent_size: latest tokens that it sees.
      implementation: attention implementation, see kernels.dispatch.
    """
    positions = [i for start, stop in sample.answers for i in range(start - 1, stop - 1)]
    # Whole blocks, so that samples with a few words more or less share a compilation. What is
    # added is position 0, from where nothing is far away.
    padding = -len(positions) % _BLOCK
    sums = _far_attention(
        params,
        jnp.asarray(np.pad(sample.tokens, (0, length - sample.tokens.size))[None]),
        jnp.asarray(positions + padding * [0], jnp.int32),
        jnp.array(sample.tokens.size),
        architecture=architecture,
        sink_size=sink_size,
        recent_size=recent_size,
        implementation=implementation,
    )
    return np.asarray(sums) / len(positions)


def kv_scores(
    architecture: ModelConfig, profile: Float[np.ndarray, "layers q_heads"]
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return the score of each KV head: the highest of the query heads that read it."""
    grouped = profile.reshape(
        architecture.num_layers, architecture.num_kv_heads, architecture.q_per_kv
    )
    return np.clip(grouped.max(axis=-1), 0.0, 1.0)  # rounding may carry a sum beyond 1


@functools.partial(
    jax.jit, static_argnames=("architecture", "sink_size", "recent_size", "implementation")
)
def _far_attention(
    params: llama.Params,
    tokens: Int[Array, "1 length"],
    positions: Int[Array, " queries"],
    total_length: Int[Array, ""],
    *,
    architecture: ModelConfig,
    sink_size: int,
    recent_size: int,
    implementation: Implementation,
) -> Float[Array, "layers q_heads"]:
    """Sum, over some positions, the attention that each head pays to far tokens."""

    def attend(q, k, v, layer_input):
        out, _ = llama.attend_full(q, k, v, None, implementation=implementation)
        sizes = {"sink_size": sink_size, "recent_size": recent_size}
        return out, _sum_over_positions(q[0], k[0], layer_input, **sizes)

    _, sums = llama.hidden_states(
        architecture,
        params,
        tokens,
        attend=attend,
        layer_inputs=jnp.broadcast_to(positions, (architecture.num_layers, *positions.shape)),
        total_length=total_length,
    )
    return sums


def _sum_over_positions(
    q: Float[Array, "length q_heads head_dim"],
    k: Float[Array, "length kv_heads head_dim"],
    positions: Int[Array, " queries"],
    *,
    sink_size: int,
    recent_size: int,
) -> Float[Array, " q_heads"]:
    """Sum one layer's attention to far tokens, a block of positions at a time."""
    length, kv_heads, head_dim = k.shape
    keys = jnp.arange(length)

    def one_block(block: Int[Array, " block"]) -> Float[Array, " q_heads"]:
        chosen = q[block].reshape(_BLOCK, kv_heads, -1, head_dim)
        wide = accumulator(q.dtype)
        scores = jnp.einsum("tkgh,skh->kgts", chosen, k, preferred_element_type=wide)
        visible = masks.causal(block, keys)
        near = masks.streaming(block, keys, sink_size=sink_size, recent_size=recent_size)
        scores = jnp.where(visible[None, None], scores * head_dim**-0.5, -jnp.inf)
        attention = jax.nn.softmax(scores, axis=-1)
        far = (visible & ~near)[None, None]
        return jnp.sum(attention, axis=(2, 3), where=far).reshape(-1)

    return jnp.sum(jax.lax.map(one_block, positions.reshape(-1, _BLOCK)), axis=0)

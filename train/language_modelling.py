"""The next-token loss of the gates, of whole texts or of answers in them.

The student, with gate-mixed attention, predicts the next token:

    cross_entropy = mean over tokens of -log p_student(token | tokens before it)

Over all tokens of ordinary text but the first it is the loss that DuoAttention's distillation is
compared with: few of them depend on something far back, so it says little about which heads can
retrieve (section 3.5). Over the tokens of answers it is their NLL. Mixing is that of distillation
(`train.distillation`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import Implementation
from kernels.precision import accumulator
from train.distillation import Batch, Mixing, teacher_and_student

# Positions whose logits exist at the same time: 0.26 GB in float32 for a vocabulary of 128,000.
_BLOCK = 512


def language_modelling_loss(
    gates: Float[Array, "layers kv_heads"],
    architecture: ModelConfig,
    params: llama.Params,
    batch: Batch,
    *,
    sink_size: int,
    recent_size: int,
    mixing: Mixing,
    implementation: Implementation = "auto",
) -> Float[Array, ""]:
    """Return the student's mean cross entropy over the tokens of `batch.answers`, in nats.

    Differentiable in `gates`; arguments as in train.distillation.distillation_loss. Without answers
    all real tokens but the first are predicted: `batch.tail_start` is not read.
    """
    _, x = teacher_and_student(
        gates,
        architecture,
        params,
        batch,
        sink_size=sink_size,
        recent_size=recent_size,
        mixing=mixing,
        implementation=implementation,
    )
    predicted = jnp.arange(1, batch.tokens.shape[1])[None] < batch.total_length[:, None]
    if batch.answers is not None:
        predicted &= batch.answers[:, 1:]

    def block_loss(
        x: Float[Array, "batch block embed"],
        targets: Int[Array, "batch block"],
        weights: Bool[Array, "batch block"],
    ) -> Float[Array, ""]:
        logits = llama.logits(architecture, params, x)
        log_p = jax.nn.log_softmax(logits.astype(accumulator(logits.dtype)), axis=-1)
        log_p = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(log_p * weights.astype(log_p.dtype))

    blocks = (_blocks(a) for a in (x[:, :-1], batch.tokens[:, 1:], predicted))

    @jax.checkpoint  # around the condition, which would keep the output projection for each block
    def loss_if_any(block: tuple[Array, Array, Array]) -> Float[Array, ""]:
        """Leave out the logits of a block where nothing is predicted: with answers, of most."""
        nothing = jnp.zeros((), accumulator(x.dtype))
        return jax.lax.cond(jnp.any(block[2]), block_loss, lambda *_: nothing, *block)

    sums = jax.lax.map(loss_if_any, tuple(blocks))
    total = jnp.sum(sums)
    return total / jnp.sum(predicted).astype(total.dtype)


def _blocks(a: Array) -> Array:
    """Cut [batch, length, ...] to [blocks, batch, _BLOCK, ...], padded with zeros."""
    size = min(_BLOCK, a.shape[1])
    padding = [(0, 0), (0, -a.shape[1] % size), *[(0, 0)] * (a.ndim - 2)]
    padded = jnp.pad(a, padding)
    cut = padded.reshape(a.shape[0], -1, size, *a.shape[2:])
    return jnp.moveaxis(cut, 1, 0)

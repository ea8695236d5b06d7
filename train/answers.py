"""How far the answers under gate-mixed attention are from those under full attention.

    divergence = mean over the answers' tokens of KL(p_full || p_mixed)

p is the distribution of a token after the true ones before it. The paper's loss compares final
states, all channels alike and the questions' tokens too (`train.distillation`); most of that
difference changes no answer. This loss is what a wrong answer consists of.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from duo_jax.model.token_scores import score_streams
from kernels import Implementation
from train.distillation import Batch, Mixing, predicted_positions, tail_of, teacher_and_student


def answer_divergence(
    gates: Float[Array, "layers kv_heads"],
    architecture: ModelConfig,
    params: llama.Params,
    batch: Batch,
    *,
    sink_size: int,
    recent_size: int,
    mixing: Mixing,
    tail_size: int,
    implementation: Implementation = "auto",
) -> Float[Array, ""]:
    """Return the mean divergence of the answers' tokens, in nats.

    Differentiable in `gates`; arguments as in train.distillation.distillation_loss. The batch must
    hold `answers`.
    """
    assert batch.answers is not None
    teacher, student = teacher_and_student(
        gates,
        architecture,
        params,
        batch,
        sink_size=sink_size,
        recent_size=recent_size,
        mixing=mixing,
        implementation=implementation,
    )
    predicted = predicted_positions(batch, tail_size)
    scores = score_streams(
        architecture,
        params,
        tail_of(student, batch, tail_size),
        jnp.take_along_axis(batch.tokens, predicted, axis=1),
        tail_of(teacher, batch, tail_size),
    )
    answers = jnp.take_along_axis(batch.answers, predicted, axis=1)
    assert scores.kl is not None
    return jnp.sum(scores.kl, where=answers) / jnp.sum(answers).astype(scores.kl.dtype)

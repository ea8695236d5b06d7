"""The distillation loss of the gates (DuoAttention, section 2.2).

A teacher runs with full attention everywhere, a student with gate-mixed attention. With H the
output of the final norm in float32, at the positions of the questions and answers:

    distillation = mean over supervised tokens, mean over channels of (H_teacher - H_student)^2

The whole loss, with the penalty on the gates, is in `train.loss`.

mixing="teacher" (as in the reference code): the student's full term is the teacher's attention
output, a constant. The teacher runs first, without gradient, and reports its attention outputs,
[layers, batch, length, q_heads, head_dim]; the student then computes streaming attention only.
mixing="self" (the paper's formula): both terms come from the student's own queries, keys, values.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import Implementation, pytree
from kernels.precision import accumulator
from train import gates as gated

Mixing = Literal["teacher", "self"]


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Token sequences of one padded length, and the supervised part of each."""

    tokens: Int[Array, "batch length"]
    tail_start: Int[Array, " batch"]  # first supervised position
    total_length: Int[Array, " batch"]  # real tokens; the tail ends here
    answers: Bool[Array, "batch length"] | None = None  # tokens whose prediction counts


def distillation_loss(
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
    """Return the mean squared difference between the student's and the teacher's final states.

    Differentiable in `gates`; the layers are rematerialised, so that the backward pass keeps only
    each layer's input. In the student with mixing="teacher", no array is quadratic in the length.

    Args:
      gates: one per layer and KV head, in [0, 1], float32.
      architecture: the model.
      params: its frozen parameters.
      batch: the samples.
      sink_size: sinks of the streaming term.
      recent_size: recent tokens of the streaming term.
      mixing: where the full term comes from.
      tail_size: positions to compare; at least the longest supervised part.
      implementation: of attention, see kernels.dispatch.
    """

    def final(x: Float[Array, "batch length embed"]) -> Float[Array, "batch tail embed"]:
        tail = tail_of(x, batch, tail_size)
        wide = tail.astype(accumulator(tail.dtype))
        return llama.final_norm(architecture, params, wide)

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
    error = jnp.mean(jnp.square(final(student) - final(teacher)), axis=-1)
    supervised = tail_positions(batch, tail_size) >= batch.tail_start[:, None]
    supervised &= tail_positions(batch, tail_size) < batch.total_length[:, None]
    supervised = supervised.astype(error.dtype)
    return jnp.sum(error * supervised) / jnp.sum(supervised)


def teacher_and_student(
    gates: Float[Array, "layers kv_heads"],
    architecture: ModelConfig,
    params: llama.Params,
    batch: Batch,
    *,
    sink_size: int,
    recent_size: int,
    mixing: Mixing,
    implementation: Implementation,
) -> tuple[Float[Array, "batch length embed"], Float[Array, "batch length embed"]]:
    """Return both residual streams after the last layer; arguments as in `distillation_loss`.

    The teacher's has no gradient. With mixing="self" a teacher that nobody uses costs nothing, as
    the compiler drops it; with mixing="teacher" the student needs the teacher's attention.
    """
    mixed = gated.teacher_mixed_attention if mixing == "teacher" else gated.self_mixed_attention
    full = gated.teacher_attention(implementation=implementation)

    def run(
        attend: llama.Attend, layer_inputs: PyTree, *, remat: bool
    ) -> tuple[Float[Array, "batch length embed"], PyTree]:
        return llama.hidden_states(
            architecture,
            params,
            batch.tokens,
            attend=attend,
            layer_inputs=layer_inputs,
            total_length=jnp.max(batch.total_length),
            remat=remat,
        )

    with jax.named_scope("teacher"):
        teacher, outputs = jax.lax.stop_gradient(run(full, None, remat=False))
    with jax.named_scope("student"):
        attend = mixed(sink_size=sink_size, recent_size=recent_size, implementation=implementation)
        layer_inputs = (gates, outputs) if mixing == "teacher" else gates
        student, _ = run(attend, layer_inputs, remat=True)
    return teacher, student


def tail_positions(batch: Batch, tail_size: int) -> Int[Array, "batch tail"]:
    """Return the positions that `tail_of` cuts out; near the end they begin before the tail."""
    start = jnp.minimum(batch.tail_start, batch.tokens.shape[1] - tail_size)
    return start[:, None] + jnp.arange(tail_size)[None, :]


def predicted_positions(batch: Batch, tail_size: int) -> Int[Array, "batch tail"]:
    """Return the positions of the tokens that those of `tail_positions` predict.

    What is at the very end predicts no token of the text; it gets the last one's position.
    """
    return jnp.minimum(tail_positions(batch, tail_size) + 1, batch.tokens.shape[1] - 1)


def tail_of(
    x: Float[Array, "batch length channels"], batch: Batch, tail_size: int
) -> Float[Array, "batch tail channels"]:
    """Cut the supervised part out of a whole sequence of states."""
    start = tail_positions(batch, tail_size)[:, 0]
    return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, tail_size))(x, start)

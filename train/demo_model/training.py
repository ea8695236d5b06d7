"""Initial weights, loss and one optimisation step of the demo model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import pytree
from kernels.packed import INT4, pack, unpack
from train.demo_model.documents import Documents

_LOGIT_ROWS = 1024  # positions whose logits exist at the same time
_EMBEDDING_STD = 0.08


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that changes from step to step, and all that a checkpoint holds."""

    params: PyTree
    optimiser: PyTree
    step: Int[Array, ""]  # optimisation steps done
    stage: Int[Array, ""]  # of the curriculum
    stage_start: Int[Array, ""]  # value of `step` when the stage began


def init_state(architecture: ModelConfig, *, seed: int, weight_decay: float) -> TrainState:
    """Draw initial weights.

    Output projections are scaled down by sqrt(2 * layers). Queries start as a copy of their keys
    plus half a random matrix: a head then prefers keys that resemble the query, which is most of
    what induction needs.
    """
    params = llama.init_params(architecture, jax.random.key(seed))
    layers = dict(params["layers"])
    attention, mlp = dict(layers["self_attn"]), dict(layers["mlp"])
    damp = 1 / math.sqrt(2 * architecture.num_layers)
    query, key = attention["q_proj"]["kernel"], attention["k_proj"]["kernel"]
    attention["q_proj"] = {"kernel": jnp.repeat(key, architecture.q_per_kv, axis=2) + 0.5 * query}
    attention["o_proj"] = {"kernel": damp * attention["o_proj"]["kernel"]}
    mlp["down_proj"] = {"kernel": damp * mlp["down_proj"]["kernel"]}
    embedding = params["embed_tokens"]["embedding"]
    embedding = embedding * (_EMBEDDING_STD / jnp.std(embedding))
    params = dict(params) | {
        "embed_tokens": {"embedding": embedding},
        "layers": layers | {"self_attn": attention, "mlp": mlp},
    }
    return TrainState(
        params=params,
        optimiser=_optimiser(weight_decay).init(params),
        step=jnp.zeros((), jnp.int32),
        stage=jnp.zeros((), jnp.int32),
        stage_start=jnp.zeros((), jnp.int32),
    )


def loss(
    params: PyTree,
    documents: Documents,
    *,
    architecture: ModelConfig,
    filler_weight: float,
    rounded_kv: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the training loss, and the fraction of answer tokens that are predicted.

    L = mean cross entropy of answers + filler_weight * mean cross entropy of ordinary text.
    With `rounded_kv`, keys and values are rounded as in a 4-bit cache.
    """
    attend = _attend_rounded if rounded_kv else llama.attend_full
    x, _ = llama.hidden_states(architecture, params, documents.tokens, attend=attend)
    x = x[:, :-1].reshape(-1, x.shape[-1])
    targets = documents.tokens[:, 1:].reshape(-1)
    answer, filler = (w[:, 1:].reshape(-1) for w in (documents.answer, documents.filler))

    @jax.checkpoint
    def chunk_sums(
        chunk: tuple[
            Float[Array, "rows embed"],
            Int[Array, " rows"],
            Float[Array, " rows"],
            Float[Array, " rows"],
        ],
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        x, targets, answer, filler = chunk
        logits = llama.logits(architecture, params, x[None])[0]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        right = (jnp.argmax(logits, axis=-1) == targets).astype(answer.dtype)
        return answer @ cross_entropy, filler @ cross_entropy, answer @ right

    pad = -x.shape[0] % _LOGIT_ROWS
    chunks = [
        jnp.pad(part, [(0, pad)] + [(0, 0)] * (part.ndim - 1)).reshape(
            -1, _LOGIT_ROWS, *part.shape[1:]
        )
        for part in (x, targets, answer, filler)
    ]
    sums = jax.lax.map(chunk_sums, tuple(chunks))
    answer_sum, filler_sum, right_sum = (jnp.sum(s) for s in sums)
    answers = jnp.sum(answer)
    value = answer_sum / answers
    value += filler_weight * filler_sum / jnp.maximum(jnp.sum(filler), 1.0)
    return value, right_sum / answers


def _attend_rounded(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    layer_input: PyTree,
) -> tuple[Float[Array, "batch length q_heads head_dim"], PyTree]:
    """Attend to keys and values in 4 bits; gradients pass as if they were not rounded."""

    def rounded(
        x: Float[Array, "batch length kv_heads head_dim"],
    ) -> Float[Array, "batch length kv_heads head_dim"]:
        packed = pack(jnp.swapaxes(jax.lax.stop_gradient(x), 1, 2), INT4)
        return x + jax.lax.stop_gradient(jnp.swapaxes(unpack(packed, x.dtype), 1, 2) - x)

    return llama.attend_full(q, rounded(k), rounded(v), layer_input)


@functools.partial(
    jax.jit, static_argnames=("architecture", "filler_weight", "weight_decay", "rounded_kv")
)
def train_step(
    state: TrainState,
    documents: Documents,
    learning_rate: Float[Array, ""],
    *,
    architecture: ModelConfig,
    filler_weight: float,
    weight_decay: float,
    rounded_kv: bool = False,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Update the weights on one batch."""
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, accuracy), gradient = grad(
        state.params,
        documents,
        architecture=architecture,
        filler_weight=filler_weight,
        rounded_kv=rounded_kv,
    )
    # optax mixes its integer step count with floats; our own code promotes nothing silently.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimiser = _optimiser(weight_decay).update(
            gradient, state.optimiser, state.params
        )
    updates = jax.tree.map(lambda u: -learning_rate * u, updates)
    state = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        optimiser=optimiser,
        step=state.step + 1,
    )
    return state, {"loss": value, "answers_right": accuracy}


@functools.partial(jax.jit, static_argnames=("architecture",))
def answers_right(
    params: PyTree, documents: Documents, *, architecture: ModelConfig
) -> Float[Array, ""]:
    """Return the fraction of answer tokens that are predicted."""
    return loss(params, documents, architecture=architecture, filler_weight=0.0)[1]


def _optimiser(weight_decay: float) -> optax.GradientTransformation:
    """Adam without its learning rate, which the curriculum decides step by step."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(weight_decay),
    )

"""A model split into retrieval and streaming heads: its config, and parameters in head order.

Parameters are reordered so that the retrieval heads of each layer come first. Then only their
number per layer matters, and nothing is gathered when the model runs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.model.llama import Params
from duo_jax.model.quantised_weights import QuantisedKernel, take
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import LARGEST_INT32, Count, Size

Leaf = Shaped[Array | np.ndarray, "..."] | QuantisedKernel

# Axis of the heads in each attention parameter of a layer, by (module, leaf).
_HEAD_AXIS: dict[tuple[str, ...], int] = {
    ("q_proj", "kernel"): 1,
    ("k_proj", "kernel"): 1,
    ("v_proj", "kernel"): 1,
    ("q_proj", "bias"): 0,
    ("k_proj", "bias"): 0,
    ("v_proj", "bias"): 0,
    ("o_proj", "kernel"): 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuoConfig:
    """A model split into retrieval and streaming heads. Hashable: static under jax.jit."""

    architecture: ModelConfig
    retrieval_counts: tuple[int, ...]  # per layer, layer 0 first
    sink_size: Size = 128
    recent_size: Count = 256

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.retrieval_counts) != self.architecture.num_layers:
            raise InputError(
                f"retrieval heads are given for {len(self.retrieval_counts)} layers, the model has "
                f"{self.architecture.num_layers}"
            )
        possible = range(self.architecture.num_kv_heads + 1)
        wrong = [heads for heads in self.retrieval_counts if heads not in possible]
        if wrong:
            raise InputError(
                f"a layer has 0 to {self.architecture.num_kv_heads} retrieval heads, not {wrong[0]}"
            )
        if self.ring_slots > LARGEST_INT32:
            raise InputError(
                f"sink {self.sink_size} and recent {self.recent_size} add up beyond int32"
            )

    @property
    def ring_slots(self) -> int:
        """Slots of a streaming head's cache."""
        return self.sink_size + self.recent_size

    def all_retrieval(self) -> "DuoConfig":
        """Return the same model without streaming heads."""
        heads = (self.architecture.num_kv_heads,) * self.architecture.num_layers
        return dataclasses.replace(self, retrieval_counts=heads)

    @property
    def num_retrieval_heads(self) -> int:
        """Number of retrieval heads in the whole model."""
        return sum(self.retrieval_counts)


def duo_config(
    architecture: ModelConfig,
    heads: Bool[np.ndarray, "layers kv_heads"],
    **sizes: int,
) -> DuoConfig:
    """Return the split of a model whose retrieval heads are True in `heads`.

    Args:
      architecture: the model.
      heads: which KV heads are retrieval heads.
      **sizes: sink_size and recent_size; default: those of `DuoConfig`.
    """
    return DuoConfig(
        architecture=architecture,
        retrieval_counts=tuple(int(count) for count in heads.sum(axis=1)),
        **sizes,
    )


def split_params(
    architecture: ModelConfig, params: Params, heads: Bool[np.ndarray, "layers kv_heads"]
) -> dict[str, Any]:
    """Return parameters in serving form: one dict per layer, retrieval heads first.

    The caller's parameters (duo_jax.model.llama's stacked form) stay as they are; everything but
    the layers is shared with them.
    """
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(len(heads))]
    split = tuple(
        reorder_layer(architecture, layer, row) for layer, row in zip(layers, heads, strict=True)
    )
    return {**params, "layers": split}


def reorder_layer(
    architecture: ModelConfig, layer: Params, heads: Bool[np.ndarray, " kv_heads"]
) -> dict[str, Any]:
    """Return one layer's parameters with the heads of `heads` first, otherwise in order."""
    attention = {
        module: {
            name: reorder(architecture, (module, name), leaf, heads)
            for name, leaf in leaves.items()
        }
        for module, leaves in layer["self_attn"].items()
    }
    return {**layer, "self_attn": attention}


def reorder(
    architecture: ModelConfig,
    name: tuple[str, ...],
    leaf: Leaf,
    heads: Bool[np.ndarray, " kv_heads"],
) -> Leaf:
    """Return a parameter of a layer, such as ("q_proj", "kernel"), with these heads first.

    numpy arrays stay on the host. Reordering and quantising may be done in either order.
    """
    order = head_order(architecture, name, heads)
    if order is None:
        return leaf
    if isinstance(leaf, QuantisedKernel):
        return take(leaf, order.indices, axis=order.axis)
    library = np if isinstance(leaf, np.ndarray) else jnp
    return library.take(leaf, order.indices, axis=order.axis)


class HeadOrder(NamedTuple):
    """New order of the heads of a parameter."""

    axis: int
    indices: Int[np.ndarray, " heads"]


def head_order(
    architecture: ModelConfig, name: tuple[str, ...], heads: Bool[np.ndarray, " kv_heads"]
) -> HeadOrder | None:
    """Return the new order of a parameter, such as ("q_proj", "kernel"); None: unchanged.

    Query heads follow their KV head. All heads share the norms of queries and keys.
    """
    axis = _HEAD_AXIS.get(name)
    kv_order = np.argsort(~heads, kind="stable")
    if axis is None or np.array_equal(kv_order, np.arange(len(heads))):
        return None
    if name[0] in ("k_proj", "v_proj"):
        return HeadOrder(axis, kv_order)
    group = np.arange(architecture.q_per_kv)
    return HeadOrder(axis, (kv_order[:, None] * architecture.q_per_kv + group[None, :]).reshape(-1))

"""Attention on several devices, each of which computes some of the heads.

XLA cannot look into a kernel. Where its inputs are cut by heads over devices, it gathers them and
lets every device compute all heads, without a word. So the functions here cut such calls in parts
themselves, where the caller has set a mesh with an axis "model" (`with jax.set_mesh(mesh)`) that
divides the KV heads. Within a jax.shard_map nothing is cut any more.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

AXIS = "model"


def num_parts(kv_heads: int) -> int:
    """Return how many devices share so many heads; 1 where all compute all."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types.get(AXIS) != AxisType.Auto:
        return 1
    size = mesh.shape[AXIS]
    return 1 if kv_heads % size else size


def by_heads(
    attention: Callable[..., Any], *arrays: jax.Array, axes: tuple[int | None, ...], kv_heads: int
) -> Any:
    """Call a function of some heads, whose results are [batch, length, heads, ...].

    Args:
      attention: the function.
      *arrays: its arguments, of all heads.
      axes: the axis of the heads in each; None where there is none.
      kv_heads: their number.
    """
    if num_parts(kv_heads) == 1:
        return attention(*arrays)
    parts = [PartitionSpec() if a is None else PartitionSpec(*[None] * a, AXIS) for a in axes]
    return jax.shard_map(
        attention,
        in_specs=tuple(parts),
        out_specs=PartitionSpec(None, None, AXIS),
        check_vma=False,  # of kernels jax does not know what varies
    )(*arrays)

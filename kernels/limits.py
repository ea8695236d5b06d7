"""What every op and every kernel here requires of its arguments."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from kernels import address_limit
from kernels.packed import Packed

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_MAX_HEAD_DIM = 256
MOSAIC_DTYPES = ("bfloat16", "float16")
MOSAIC_HEAD_DIMS = (64, 80, 96, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why no kernel can take a case."""

    reason: str
    auto_may_use_xla: bool = True  # see kernels.dispatch


def check_shapes(
    q: Array, k: Array | Packed, v: Array | Packed, *, kv_heads_axis: int, paged: bool = False
) -> None:
    """Refuse keys and values that do not fit the queries.

    Those of a paged cache have pages where others have rows.

    Raises:
      ValueError: sizes differ, an array is empty, KV heads do not divide the query heads, a dtype
        is not floating-point, or only one of keys and values is packed.
    """
    for what, x in (("queries", q), ("keys", k), ("values", v)):
        if not isinstance(x, Packed) and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{what} are {x.dtype}, not floating-point numbers")
    if isinstance(k, Packed) != isinstance(v, Packed):
        raise ValueError("of keys and values one is packed and the other is not")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or not (paged or q.shape[0] == k.shape[0]):
        raise ValueError(
            f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit: they share batch "
            f"and head_dim, keys and values everything"
        )
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"queries {q.shape} or keys {k.shape} are empty")
    if q.shape[-2] % k.shape[kv_heads_axis]:
        raise ValueError(
            f"{q.shape[-2]} query heads are not a multiple of {k.shape[kv_heads_axis]} KV heads"
        )


def check_sequences(q: Array, k: Array, v: Array) -> None:
    """Refuse keys and values [batch, length, kv_heads, head_dim] that do not fit the queries.

    Raises:
      ValueError: for the reasons of `check_shapes`, or the lengths differ.
    """
    check_shapes(q, k, v, kv_heads_axis=2)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"there are {q.shape[1]} queries and {k.shape[1]} keys in a row")


def check_parts(outs: Array, lses: Array) -> None:
    """Refuse logarithms [parts, *rows] that do not fit outputs [parts, *rows, head_dim].

    Raises:
      ValueError: the shapes differ, an array is empty, or a dtype is not floating-point.
    """
    if outs.shape[:-1] != lses.shape or outs.ndim < 2:
        raise ValueError(f"outputs {outs.shape} and logarithms {lses.shape} do not fit")
    if not outs.size:
        raise ValueError(f"outputs {outs.shape} are empty")
    for what, x in (("outputs", outs), ("logarithms", lses)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{what} are {x.dtype}, not floating-point numbers")


def check_rows(what: str, numbers: Array, batch: int) -> None:
    """Refuse anything but one integer per row.

    Raises:
      ValueError: another shape or dtype.
    """
    if numbers.shape != (batch,) or not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise ValueError(f"{what} are {numbers.dtype} {numbers.shape}, not {batch} integers")


def refusal(q: Array, *operands: Array | Packed) -> Refusal | None:
    """Return why no kernel can take these arrays, the queries first; None if one can."""
    if q.dtype not in _DTYPES:
        return Refusal(reason=f"kernels take bfloat16, float16 and float32, not {q.dtype}")
    unpacked = [x for x in operands if not isinstance(x, Packed)]
    other = [x.dtype for x in unpacked if x.dtype != q.dtype]
    if other:
        return Refusal(reason=f"queries are {q.dtype}, keys and values {other[0]}")
    if q.shape[-1] > _MAX_HEAD_DIM:
        return Refusal(reason=f"head_dim is {q.shape[-1]}, kernels take at most {_MAX_HEAD_DIM}")
    return too_large(q, *operands)


def mosaic_refusal(q: Array) -> Refusal | None:
    """Return why no Mosaic kernel can take these queries, which others may; None if one can."""
    if q.dtype.name not in MOSAIC_DTYPES:
        return Refusal(reason=f"Mosaic kernels take bfloat16 and float16, not {q.dtype}")
    if q.shape[-1] not in MOSAIC_HEAD_DIMS:
        return Refusal(reason=f"head_dim is {q.shape[-1]}, Mosaic kernels take 64, 80, 96 and 128")
    return None


def too_large(*arrays: Array | Packed) -> Refusal | None:
    """Return a refusal if one of some arrays has more elements than a kernel can address."""
    reason = address_limit.too_large(arrays)
    return None if reason is None else Refusal(reason=reason, auto_may_use_xla=False)

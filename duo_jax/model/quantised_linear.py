"""Products of activations with quantised weights (duo_jax.model.quantised_weights).

What XLA compiles them to for an A100 (kernels.aot), for the MLP matrices of Llama-3-8B:

    int8   y = (x @ q) * scale: q is converted on its way into the product, without a buffer.
    w8a8   y = (x_q @ q) * x_scale * scale, x_q and q int8: the int32 product is a buffer. In
           decoding XLA joins q, k and v and copies them side by side in int8 (25 MB; barriers do
           not help).
    int4   Up to 4 rows: sums over the groups, channel by channel, then over the channels of a
           group; q is read once per row, and the only buffer holds the partial sums, at most 7 MB.
           More rows: one matrix is dequantised at a time (117 MB).

Tried for few int4 rows and dropped: one sum over all inputs (XLA writes a float32 transpose of a
narrow matrix, k_proj, and of any matrix for two rows in one reduction), and one dot per group (its
partial sums are as large as the matrix). A custom kernel could read int4 once for all rows. None
of this has been timed on a GPU.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, Shaped

from duo_jax.model.quantised_weights import LARGEST, QuantisedKernel, dequantise

FEW_ROWS = 4  # reading int4 for each of them costs no more than reading bfloat16 once


def product(
    x: Float[Array, "..."], kernel: QuantisedKernel, *, inputs: int, wide: DTypeLike
) -> Float[Array, "..."]:
    """Multiply activations by a quantised projection.

    Args:
      x: activations, [..., *kernel.shape[:inputs]].
      kernel: the projection.
      inputs: number of its input axes.
      wide: dtype of sums and result.

    Returns:
      [..., *kernel.shape[inputs:]] in `wide`, not rounded to the dtype of x.
    """
    leading = x.shape[: x.ndim - inputs]
    rows = x.reshape(math.prod(leading), -1)
    if kernel.format == "int4" and len(rows) <= FEW_ROWS:
        out = _by_groups(rows, kernel, inputs, wide)
    elif kernel.format == "int4":
        out = _dot(rows, dequantise(kernel).astype(x.dtype), wide)
    elif kernel.format == "w8a8":
        out = _int8_by_int8(rows, kernel, wide)
    else:
        out = _dot(rows, kernel.values.astype(x.dtype), wide) * _per_output(kernel, wide)
    return out.reshape(*leading, *kernel.shape[inputs:])


def quantise_rows(
    rows: Float[Array, "rows inputs"],
) -> tuple[Int8[Array, "rows inputs"], Float32[Array, "rows 1"]]:
    """Quantise activations to int8, one scale per row: max |x| / 127."""
    wide = rows.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=1, keepdims=True) / LARGEST["int8"]
    scales = jnp.where(scales > 0, scales, 1.0)
    return jnp.round(wide / scales).astype(jnp.int8), scales


def _int8_by_int8(
    rows: Float[Array, "rows inputs"], kernel: QuantisedKernel, wide: DTypeLike
) -> Float[Array, "rows outputs"]:
    quantised, row_scales = quantise_rows(rows)
    exact = _dot(quantised, kernel.values, jnp.int32)
    return exact.astype(wide) * row_scales.astype(wide) * _per_output(kernel, wide)


def _per_output(kernel: QuantisedKernel, wide: DTypeLike) -> Float[Array, "1 outputs"]:
    return jnp.asarray(kernel.scales).reshape(1, -1).astype(wide)


def _dot(
    rows: Shaped[Array, "rows inputs"], matrix: Shaped[Array | np.ndarray, "..."], wide: DTypeLike
) -> Shaped[Array, "rows outputs"]:
    """Multiply; pads a single row to two, or XLA:GPU writes out every product before it sums."""
    matrix = matrix.reshape(rows.shape[1], -1)
    padding = ((0, 1 if len(rows) == 1 else 0), (0, 0))
    dimensions = (((1,), (0,)), ((), ()))
    out = jax.lax.dot_general(
        jnp.pad(rows, padding), matrix, dimensions, preferred_element_type=wide
    )
    return out[: len(rows)]


def _by_groups(
    rows: Float[Array, "rows inputs"], kernel: QuantisedKernel, inputs: int, wide: DTypeLike
) -> Float[Array, "rows outputs"]:
    """Multiply, summing over groups first: neighbouring threads then read neighbouring weights.

    The barrier keeps XLA from joining both sums into one, for which it would transpose the matrix.
    """
    groups = math.prod(kernel.scales.shape[:inputs])
    values = kernel.values.reshape(groups, rows.shape[1] // groups, -1)
    weights = values.astype(wide) * kernel.scales.reshape(groups, 1, -1).astype(wide)
    sums = [
        jnp.sum(row.astype(wide).reshape(groups, -1, 1) * weights, axis=0)  # [group size, outputs]
        for row in rows
    ]
    return jnp.stack([jnp.sum(jax.lax.optimization_barrier(partial), axis=0) for partial in sums])

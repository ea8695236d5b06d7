"""Weights of the layers' projections in 8 or 4 bits: storage formats and quantisation.

    "model"  as stored: nothing is quantised
    "int8"   w = scale * q, q from -127 to 127, one scale per output channel
    "w8a8"   the same weights; activations are quantised too, one scale per token, while the
             model runs, and int8 x int8 products are added up exactly in int32
    "int4"   w = scale * q, q from -7 to 7, one scale per output channel and group of inputs

All are symmetric: scale = max |w| / (largest q), in float32. Only q, k, v, o, gate, up and down
projections are quantised; embeddings, lm_head, norms and biases keep the model's dtype.

A group of "int4" is `group_size` neighbours on the last input axis: 128 where that divides it. In
o_proj that axis is head_dim, so groups lie within a head, and reordering heads moves whole groups.

Quantising is done by numpy, so that the same weights give the same bits on every machine. jax
stores int4 in 4 bits on GPUs and in 8 on CPUs.

qwix (0.1.8) was tried and left. Its int8 x int8 product meets its scales in the model's dtype: an
error under strict promotion, and the exact int32 sums rounded to bfloat16 otherwise. Weight-only,
it dequantises before multiplying, so that an int4 decode step writes and reads every matrix in
bfloat16, 117 MB for one of Llama-3-8B.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float32, Shaped

from duo_jax.errors import InputError
from duo_jax.schema.check import argument
from kernels import pytree

WeightFormat = Literal["model", "int8", "w8a8", "int4"]
StoredFormat = Literal["model", "int8", "int4"]

LARGEST = {"int8": 127, "int4": 7}
_DTYPES = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}
GROUP, _SMALLEST_GROUP = 128, 16
_BLOCK_SIZE = 1 << 21  # values that are quantised at once


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisedKernel:
    """One projection's weights: scales (broadcast over groups) * values.

    Both have the projection's own axes, inputs first. `scales` has one entry per group along an
    input axis: one in all in int8.
    """

    values: Shaped[Array | np.ndarray, "..."]  # int8 or int4
    scales: Float32[Array | np.ndarray, "..."]
    format: WeightFormat = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes


def check_weight_format(name: str) -> WeightFormat:
    """Return the format of this name.

    Raises:
      InputError: there is none.
    """
    return argument("weight format", name, WeightFormat)


def stored_format(weight_format: WeightFormat) -> StoredFormat:
    """Return how the weights of a format are stored: w8a8 is stored as int8."""
    return "int8" if weight_format == "w8a8" else weight_format


def is_quantised(path: tuple[str, ...]) -> bool:
    """Whether a parameter, such as ("layers", "mlp", "up_proj", "kernel"), is quantised at all."""
    return path[0] == "layers" and path[-1] == "kernel"


def num_input_axes(module: str) -> int:
    """Return how many leading axes of a projection are inputs: o_proj has heads and head_dim."""
    return 2 if module == "o_proj" else 1


def group_size(axis: int) -> int:
    """Return the length of the groups of "int4": the largest divisor of the axis up to 128.

    Raises:
      InputError: it would be less than 16, and the scales would weigh more than half of the saving.
    """
    size = max(size for size in range(1, min(GROUP, axis) + 1) if axis % size == 0)
    if size < min(_SMALLEST_GROUP, axis):
        raise InputError(
            f"int4 weights come in groups of {_SMALLEST_GROUP} to {GROUP} inputs, into which "
            f"{axis:,} inputs cannot be divided; use int8"
        )
    return size


def scales_shape(shape: tuple[int, ...], inputs: int, stored: StoredFormat) -> tuple[int, ...]:
    """Return the shape of a projection's scales, given its number of input axes.

    Raises:
      InputError: as `group_size`.
    """
    if stored == "int8":
        return (1,) * inputs + shape[inputs:]
    last = shape[inputs - 1]
    return (*shape[: inputs - 1], last // group_size(last), *shape[inputs:])


def value_dtype(stored: StoredFormat) -> np.dtype:
    """Return the type of a format's values."""
    return _DTYPES[stored]


def quantise(
    kernel: Shaped[np.ndarray, "..."],
    *,
    module: str,
    weight_format: WeightFormat,
    name: str = "a projection",
) -> QuantisedKernel:
    """Quantise one projection's weights, rounding to nearest; on the host, block by block.

    Args:
      kernel: the weights, inputs first; may be a strided view.
      module: name of the projection, such as "o_proj".
      weight_format: "int8", "w8a8" or "int4".
      name: name of the weights in messages.

    Raises:
      InputError: a weight is not finite, or as `group_size`.
    """
    stored = stored_format(weight_format)
    inputs = num_input_axes(module)
    shape = scales_shape(kernel.shape, inputs, stored)
    groups, outputs = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    flat = kernel.reshape(groups, -1, outputs)
    values = np.empty(flat.shape, value_dtype(stored))
    scales = np.empty((groups, 1, outputs), np.float32)
    largest = LARGEST[stored]
    columns = max(1, _BLOCK_SIZE * outputs // kernel.size)
    for start in range(0, outputs, columns):
        block = np.s_[:, :, start : start + columns]
        wide = np.array(flat[block], np.float32, order="C")
        scale = np.abs(wide).max(axis=1, keepdims=True) / np.float32(largest)
        if not np.isfinite(scale).all():
            raise InputError(f"{name} has values that are not finite: they cannot be quantised")
        scale = np.where(scale > 0, scale, np.float32(1))
        wide /= scale
        # Only subnormal scales, rounded coarsely, can lead beyond the largest value.
        values[block] = np.clip(np.rint(wide, out=wide), -largest, largest)
        scales[block] = scale
    return QuantisedKernel(
        values=values.reshape(kernel.shape), scales=scales.reshape(shape), format=weight_format
    )


def quantise_params(params: Mapping[str, Any], weight_format: WeightFormat) -> dict[str, Any]:
    """Return parameters in serving form (duo_jax.heads.split) with their projections quantised.

    Everything else is shared with `params`. Loading a model quantises tensor by tensor instead.
    """

    def convert(module: str, kernel: Array) -> QuantisedKernel:
        quantised = quantise(np.asarray(kernel), module=module, weight_format=weight_format)
        return jax.tree.map(jnp.asarray, quantised)

    return _map_kernels(convert, params, weight_format)


def quantised_shapes(params: Mapping[str, Any], weight_format: WeightFormat) -> dict[str, Any]:
    """Return the shapes of `quantise_params`, given the shapes of the parameters."""

    def convert(module: str, kernel: jax.ShapeDtypeStruct) -> QuantisedKernel:
        stored = stored_format(weight_format)
        shape = scales_shape(kernel.shape, num_input_axes(module), stored)
        return jax.eval_shape(
            lambda: QuantisedKernel(
                values=jnp.zeros(kernel.shape, value_dtype(stored)),
                scales=jnp.zeros(shape, jnp.float32),
                format=weight_format,
            )
        )

    return _map_kernels(convert, params, weight_format)


def format_of(params: Mapping[str, Any]) -> WeightFormat:
    """Return the format of parameters in serving form."""
    kernel = params["layers"][0]["mlp"]["down_proj"]["kernel"]
    return kernel.format if isinstance(kernel, QuantisedKernel) else "model"


def take(
    kernel: QuantisedKernel, indices: Shaped[np.ndarray, " count"], *, axis: int
) -> QuantisedKernel:
    """Reorder a kernel along an axis of heads; scales are reordered where they have that axis."""
    size = kernel.shape[axis]
    assert kernel.scales.shape[axis] in (1, size), "groups cannot be reordered"

    def along(part: Array | np.ndarray) -> Array | np.ndarray:
        if part.shape[axis] != size:
            return part
        library = np if isinstance(part, np.ndarray) else jnp
        return library.take(part, indices, axis=axis)

    return jax.tree.map(along, kernel)


def dequantise(kernel: QuantisedKernel) -> Float32[Array, "..."]:
    """Return the weights in float32."""
    scales = jnp.asarray(kernel.scales)
    for axis, (size, groups) in enumerate(zip(kernel.shape, scales.shape, strict=True)):
        if groups not in (1, size):
            scales = jnp.repeat(scales, size // groups, axis=axis)
    return jnp.asarray(kernel.values).astype(jnp.float32) * scales


def _map_kernels(
    convert: Callable[[str, Any], QuantisedKernel],
    params: Mapping[str, Any],
    weight_format: WeightFormat,
) -> dict[str, Any]:
    """Convert the kernel of every projection; the format "model" leaves them alone."""
    if weight_format == "model":
        return dict(params)

    def projection(module: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
        if "kernel" not in leaves:
            return dict(leaves)
        return {**leaves, "kernel": convert(module, leaves["kernel"])}

    def layer(parts: Mapping[str, Any]) -> dict[str, Any]:
        blocks = {
            block: {module: projection(module, leaves) for module, leaves in parts[block].items()}
            for block in ("self_attn", "mlp")
        }
        return {**parts, **blocks}

    return {**params, "layers": tuple(map(layer, params["layers"]))}

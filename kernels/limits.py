"""What every Triton kernel here needs of its arguments."""

import jax.numpy as jnp
from jaxtyping import Array

# Offsets inside a Triton kernel are 32-bit element counts, even from 64-bit indices: beyond this
# they wrap around silently.
MAX_ELEMENTS = 2**31 - 1
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_MAX_HEAD_DIM = 256


def refusal(q: Array, *operands: Array) -> str | None:
    """Return why no kernel can take these arrays, the queries first; None if one can."""
    if q.dtype not in _DTYPES:
        return f"kernels take bfloat16, float16 and float32, not {q.dtype}"
    if any(x.dtype != q.dtype for x in operands):
        return f"queries are {q.dtype}, keys and values {operands[0].dtype}"
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim is {q.shape[-1]}, kernels take at most {_MAX_HEAD_DIM}"
    largest = max((q, *operands), key=lambda x: x.size)
    if largest.size > MAX_ELEMENTS:
        return (
            f"an array of shape {largest.shape} has {largest.size:,} elements; offsets inside a "
            f"kernel end at {MAX_ELEMENTS:,}"
        )
    return None

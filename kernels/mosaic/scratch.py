"""Shared memory and barriers of a Mosaic program; kernels.mosaic.walk says who uses them."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels import compat
from kernels.mosaic.reader import Reader
from kernels.mosaic.work import ALIGNED, ROWS, Shape


def of(shape: Shape, out_dtype: DTypeLike) -> dict[str, Any]:
    """Return what a program of some sizes has, by name."""
    plgpu = compat.mosaic()
    workers, stages, dtype = shape.workers, shape.num_stages, shape.dtype

    def matrix(*sizes: int, dtype: DTypeLike = dtype, columns: int = shape.keys.columns):
        swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
        layout = (plgpu.TilingTransform((ALIGNED, columns)), swizzle)
        return plgpu.SMEM(sizes, dtype, transforms=layout)

    def staged(reader: Reader):
        return tuple(
            matrix(stages, *x.shape) if x.is_matrix else plgpu.SMEM((stages, *x.shape), x.dtype)
            for x in reader.stored(shape.block_kv)
        )

    rooms = {
        "q_s": matrix(workers, ROWS, shape.head_dim),
        "k_s": staged(shape.keys),
        "v_s": staged(shape.values),
        "p_s": matrix(workers, ROWS, shape.block_kv),
        "lse_s": plgpu.SMEM((workers, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=workers),
    }
    loads = sum(x.copies for x in shape.keys.stored(shape.block_kv))
    for x in "kv":
        rooms[f"{x}_full"] = plgpu.Barrier(num_barriers=stages, num_arrivals=loads)
        rooms[f"{x}_free"] = plgpu.Barrier(num_barriers=stages, num_arrivals=workers)
        if shape.packed:
            rooms[f"unpacked_{x}"] = matrix(shape.block_kv, shape.head_dim)
    if out_dtype != dtype:
        columns = 32 if shape.head_dim % 32 == 0 else 16
        rooms["out_s"] = matrix(workers, ROWS, shape.head_dim, dtype=out_dtype, columns=columns)
    return rooms

"""Everything that depends on the jax version or on the GPU at hand; no other file checks either.

Pallas has two lowerings for GPUs. Only the Triton one has matrix instructions on A100 (sm_80); it
is chosen by its compiler parameters, since a bare pallas_call means Mosaic on jax 0.10 and Triton
from 0.11 on. Tested with jax 0.10.2, 0.11.2 and 0.12.0. A later jax will drop that lowering, so it
is imported when a kernel is traced; everything else works without it.

Part of duo_jax.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool

from kernels import address_limit
from kernels.errors import UnsupportedError
from kernels.gpu import A100, INTERPRETER, Gpu

INTERPRETER_THREADS = 4  # for three warpgroups and the program that waits for them
TESTED = "jax>=0.10.2,<0.13"  # as in pyproject.toml


@functools.cache
def _triton() -> Any:
    """Import Pallas' Triton lowering; None if this jax does not have what kernels use of it."""
    try:
        from jax.experimental.pallas import triton
        from jax.experimental.pallas.triton import CompilerParams, load, store  # noqa: F401
    except ImportError:
        return None
    return triton


def no_triton() -> str | None:
    """Return why no kernel can be traced, not even for the interpreter; None if kernels can be."""
    if _triton() is not None:
        return None
    return (
        f"needs Pallas' Triton lowering, which jax {jax.__version__} does not have; "
        f"run pip install '{TESTED}', or choose implementation='xla'"
    )


def load(at: Any, *, mask: Bool[Array, "..."], other: int) -> Array:
    """Read a tile of a ref; `other` where the mask is False."""
    return _triton().load(at, mask=mask, other=other)


def store(at: Any, value: Array, *, mask: Bool[Array, "..."]) -> None:
    """Write a tile of a ref where the mask is True."""
    _triton().store(at, value, mask=mask)


def target_gpu() -> Gpu | None:
    """Return the NVIDIA GPU that tracing now is for, or None if it is for something else.

    That is the device of the abstract mesh, if one is set to compile for a GPU that is not there
    (jax.experimental.topologies), else the default backend's first device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        if described.platform not in ("gpu", "cuda"):
            return None
        return Gpu(kind=described.device_kind, num_cores=described.num_cores or A100.num_cores)
    return _present_gpu()


def tile_gpu() -> Gpu:
    """Return the GPU that tile sizes are chosen for: the target, else the interpreter's."""
    return target_gpu() or INTERPRETER


@functools.cache
def _present_gpu() -> Gpu | None:
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    # AMD's capabilities begin with "gfx"; old NVIDIA GPUs lack "NVIDIA" in the name ("Tesla T4").
    if "NVIDIA" not in device.device_kind and not capability[:1].isdigit():
        return None
    return Gpu(
        kind=device.device_kind,
        num_cores=getattr(device, "core_count", None) or A100.num_cores,
        compute_capability=capability,
    )


def pallas_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: Sequence[int],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Callable[..., Any]:
    """Return a Pallas kernel for the Triton lowering, or for the interpreter.

    Raises:
      UnsupportedError: an output has more elements than a kernel can address.
    """
    reason = address_limit.too_large(out_shape)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    call = pl.pallas_call(
        kernel,
        name=name,
        grid=tuple(grid),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=_triton().CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
    )
    return address_limit.check_batches(call)


@functools.cache
def _mosaic() -> Any:
    """Import Pallas' Mosaic lowering; None if this jax's is older than what kernels use of it."""
    if jax.__version_info__ < (0, 11):
        return None
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError:
        return None
    return mosaic_gpu


def mosaic() -> Any:
    """Return Pallas' Mosaic lowering, which `no_mosaic` said to be there."""
    return _mosaic()


def no_mosaic() -> str | None:
    """Return why no Mosaic kernel can be traced, not even for a CPU; None if they can be."""
    if _mosaic() is not None:
        return None
    return (
        f"needs Pallas' Mosaic lowering of jax 0.11 or newer (Python 3.12 or newer), and this is "
        f"jax {jax.__version__}"
    )


def no_mosaic_interpreter() -> str | None:
    """Return why no Mosaic kernel can run on a CPU; None if they can.

    Each warpgroup is a program of its own there, and so is the one that calls the kernel: where XLA
    has fewer threads, all of these may wait for one that never starts.
    """
    if no_mosaic() is not None:
        return no_mosaic()
    if jax.__version_info__ < (0, 12):
        return f"needs Mosaic's interpreter of jax 0.12 or newer, and this is jax {jax.__version__}"
    threads = int(os.environ.get("PJRT_NPROC") or os.cpu_count() or 1)
    if threads >= INTERPRETER_THREADS:
        return None
    return (
        f"needs {INTERPRETER_THREADS} threads, or its warpgroups wait for each other forever, and "
        f"XLA has {threads}: start the process with PJRT_NPROC={INTERPRETER_THREADS}"
    )


def mosaic_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: dict[str, int],
    num_threads: int,
    out_type: Any,
    scratch_types: dict[str, Any],
    interpret: bool,
) -> Callable[..., Any]:
    """Return a Pallas kernel for the Mosaic lowering, or for a CPU, where a data race is an error.

    Axes of the grid have names, the innermost last; the axis "warpgroup" has num_threads.

    Raises:
      UnsupportedError: an output has more elements than a kernel can address.
    """
    reason = address_limit.too_large(out_type)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    call = mosaic().kernel(
        kernel,
        kernel_name=name,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=num_threads,
        thread_name="warpgroup",
        out_type=out_type,
        scratch_types=scratch_types,
        compiler_params=mosaic().CompilerParams(approx_math=True),
        interpret=mosaic().InterpretGPUParams(detect_races=True) if interpret else None,
    )
    return address_limit.check_batches(call)


def ptx_dump_flags(folder: str) -> str:
    """Return the XLA_FLAGS with which a process leaves the PTX of all kernels in a folder."""
    flags = f"--xla_dump_to={folder}"
    if jax.__version_info__ >= (0, 11):  # where PTX is written on request only
        flags += " --xla_dump_emitter_re=ptx"
    return flags

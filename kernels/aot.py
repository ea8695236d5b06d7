"""Ahead-of-time compilation for a described GPU, on a machine without one.

Needs jax's CUDA plugin of the same version as jax, without the CUDA libraries (the extra "aot"),
and ptxas and nvlink, on PATH or from the same extra. Nothing is executed, and there is no
autotuning. The GPUs are described by the files in kernels/gpu_targets, as XLA's own tools write
them for a device; an H100 (SXM) is an H200 with less and slower memory.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Target = Literal["a100", "h100", "h200"]

# Where arguments fill most of the memory, this pass runs with an impossible limit and multiplies
# the same matrices again and again.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}


def on_cpu() -> None:
    """Let this process run on its CPU, as all must that compile; before jax makes an array.

    Else jax looks for a GPU, and a process that has one cannot describe another one.
    """
    jax.config.update("jax_platforms", "cpu")


def unavailable() -> str | None:
    """Return why nothing can be compiled for a GPU here, in one line; None if it can."""
    # Of another version than jax, the plugin would end the process.
    for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        try:
            version = importlib.metadata.version(plugin)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version != jax.__version__:
            return f"{plugin} is {version}, jax is {jax.__version__}: they must be the same"
    for tool in ("ptxas", "nvlink"):
        if shutil.which(tool) is None and _toolkit() is None:
            return f"{tool} is not on PATH (it comes with CUDA, or with the extra aot)"
    try:
        mesh("a100", (1,), ("x",))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        return f"jax has no CUDA plugin (the extra aot), or JAX_PLATFORMS is not cpu: {reason}"
    return None


def lower_for(
    target: Target,
    function: Callable[..., Any],
    *args: Any,
    donate_argnums: tuple[int, ...] = (),
    devices: Mesh | None = None,
) -> jax.stages.Lowered:
    """Lower a function of arrays for one GPU, or several.

    Args:
      target: the GPU.
      function: what to lower.
      *args: trees of jax.ShapeDtypeStruct or arrays.
      donate_argnums: arguments that are updated in place.
      devices: from `mesh`; arguments lie where their shapes say, or whole on each of them.
    """
    devices = devices or mesh(target, (1,), ("x",))
    whole = NamedSharding(devices, PartitionSpec())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        where = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where or whole)

    args = jax.tree.map(placed, args)
    with jax.sharding.use_abstract_mesh(devices.abstract_mesh), _no_source_lines():
        return jax.jit(function, donate_argnums=donate_argnums).lower(*args)


def compile_lowered(
    lowered: jax.stages.Lowered, *, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compile what `lower_for` returned.

    Args:
      lowered: the program.
      options: more options of XLA's compiler.

    Returns:
      The program; its memory_analysis().peak_memory_in_bytes is the peak on that GPU.
    """
    tools = {}
    if shutil.which("ptxas") is None and _toolkit() is not None:
        tools = {"xla_gpu_cuda_data_dir": str(_toolkit())}
    return lowered.compile(compiler_options={**COMPILER_OPTIONS, **tools, **(options or {})})


def compile_for(
    target: Target,
    function: Callable[..., Any],
    *args: Any,
    donate_argnums: tuple[int, ...] = (),
    devices: Mesh | None = None,
) -> jax.stages.Compiled:
    """Lower and compile; arguments as in `lower_for`, result as in `compile_lowered`."""
    lowered = lower_for(target, function, *args, donate_argnums=donate_argnums, devices=devices)
    return compile_lowered(lowered)


def fingerprint(target: Target, lowered: jax.stages.Lowered) -> str:
    """Return a hash of a program's text and its GPU; the same text compiles to the same kernels.

    It depends on the version of jax, but not on the folder of this repository, nor on lines that
    move within a file.
    """
    text = "\n".join((lowered.as_text(), description(target), str(COMPILER_OPTIONS)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ptxas() -> str:
    """Return the ptxas that understands what jax's plugin writes: the wheel's, else PATH's.

    XLA finds the wheel by itself, and writes PTX as new as the wheel's ptxas can read.
    """
    toolkit = _toolkit()
    return "ptxas" if toolkit is None else str(toolkit / "bin" / "ptxas")


@functools.cache
def _toolkit() -> pathlib.Path | None:
    """Return where the wheel nvidia-cuda-nvcc put ptxas, nvlink and libdevice; None if nowhere."""
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia and nvidia.submodule_search_locations) or ():
        toolkit = pathlib.Path(folder, "cu13")
        if (toolkit / "bin" / "ptxas").exists() and (toolkit / "bin" / "nvlink").exists():
            return toolkit
    return None


def description(target: Target) -> str:
    """Return what XLA is told of a GPU: a text protocol buffer with the limits of its cores."""
    file = importlib.resources.files("kernels").joinpath("gpu_targets", f"{target}.txtpb")
    return file.read_text(encoding="utf-8")


@contextlib.contextmanager
def _no_source_lines() -> Iterator[None]:
    """Keep file names and line numbers out of the text of programs."""
    limit = getattr(jax.config, "jax_traceback_in_locations_limit")  # noqa: B009
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


@functools.cache
def mesh(target: Target, shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    """Return GPUs of one machine, which need not be here, as a mesh."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description(target), topology=f"1x{math.prod(shape)}x1"
    )
    return topologies.make_mesh(topology, shape, axes)

"""Which implementation of an op runs.

- "xla": jax.numpy, on any device; the reference of the kernels.
- "triton": the Pallas kernel through its Triton lowering, on NVIDIA GPUs from A100 on (compute
  capability 8.0).
- "interpret": the same kernel in Pallas' interpreter, on any device; slow, for tests.
- "mosaic": the kernel for Hopper GPUs (H100, H200) through Pallas' Mosaic lowering of jax 0.11 or
  newer. Forward only, bfloat16 and float16, head_dim 64 to 128; it reads packed caches too.
- "interpret_mosaic": the same kernel on a CPU, with race detection, for tests; very slow, and from
  jax 0.12 on.
- "auto": "triton" where the program runs on such a GPU, else "xla". "mosaic" on a Hopper where jax
  has no Triton lowering, and for the ops of MOSAIC_IS_FASTER: none, until it has been measured.

A named choice is obeyed or refused, never replaced. "auto" takes "xla" where jax has no lowering
for the GPU and, on a GPU with kernels, for what no kernel here is written for: other dtypes
(float64, or keys of another dtype than queries) and a head_dim above 256. "auto" also refuses
arrays of 2^31 elements or more: kernels cannot address them, and XLA may need many times their
memory. Pass implementation="xla" to run them.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from kernels import compat
from kernels.errors import UnsupportedError
from kernels.gpu import Gpu
from kernels.limits import Refusal

# The ops that the committed run of benchmarks.gpu_report, on a Hopper, found faster through Mosaic
# than through Triton in every case (benchmarks.gpu.mosaic.faster_ops); a test compares them.
MOSAIC_IS_FASTER: frozenset[str] = frozenset()

Implementation = Literal["auto", "xla", "triton", "interpret", "mosaic", "interpret_mosaic"]


def check(implementation: str) -> None:
    """Refuse an implementation that does not exist, or whose kernels cannot run here.

    Raises:
      ValueError: there is no such implementation.
      UnsupportedError: it cannot run on this device.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation=} is not one of {', '.join(get_args(Implementation))}")
    reason = None
    if implementation == "triton":
        reason = _no_kernels(compat.target_gpu())
    elif implementation == "interpret":
        reason = compat.no_triton()
    elif implementation == "mosaic":
        reason = _no_mosaic(compat.target_gpu())
    elif implementation == "interpret_mosaic":
        reason = compat.no_mosaic_interpreter()
    if reason is not None:
        raise UnsupportedError(f"{implementation=} {reason}")


def dispatch(
    implementation: Implementation,
    *,
    op: str,
    xla: Callable[[], Any],
    triton: Callable[[bool], Any],
    refusal: Refusal | None,
    mosaic: Callable[[bool], Any],
    mosaic_refusal: Refusal | None,
) -> Any:
    """Run one of an op's implementations.

    Args:
      implementation: the choice.
      op: as kernels.all_cases names it.
      xla: runs the XLA version.
      triton: runs the Triton kernel; True asks for the interpreter.
      refusal: why no kernel can serve this case; None if one can.
      mosaic: runs the Mosaic kernel; True asks for the interpreter.
      mosaic_refusal: why the Mosaic kernel cannot serve this case, while another may.

    Raises:
      ValueError: there is no such implementation.
      UnsupportedError: it cannot run here; the message says why.
    """
    check(implementation)
    gpu = compat.target_gpu()
    run, refused = triton, refusal
    by_mosaic = "mosaic" in implementation
    if implementation == "auto" and _no_mosaic(gpu) is None:
        faster = op in MOSAIC_IS_FASTER and mosaic_refusal is None
        by_mosaic = faster or compat.no_triton() is not None
    if by_mosaic:
        run, refused = mosaic, refusal or mosaic_refusal
    if implementation not in ("auto", "xla"):
        if refused is not None:
            raise UnsupportedError(f"{implementation=}: {refused.reason}")
        return run(implementation.startswith("interpret"))
    if implementation == "xla" or (not by_mosaic and _no_kernels(gpu) is not None):
        return xla()
    if refused is not None:
        if not refused.auto_may_use_xla:
            raise UnsupportedError(f"{implementation=}: {refused.reason}")
        return xla()
    # Decided again when the program is lowered, maybe for another device than the default one.
    return jax.lax.platform_dependent(cuda=lambda: run(False), default=xla)


def _no_mosaic(gpu: Gpu | None) -> str | None:
    """Return why Mosaic kernels cannot run on a device; None if they can."""
    if compat.no_mosaic() is not None:
        return compat.no_mosaic()
    if gpu is None:
        return f"needs a Hopper GPU (H100, H200), and this process runs on {jax.default_backend()}"
    if not gpu.is_hopper:
        return f"needs a Hopper GPU (H100, H200), not {gpu.kind}"
    return None


def _no_kernels(gpu: Gpu | None) -> str | None:
    """Return why kernels cannot run on a device; None if they can."""
    if compat.no_triton() is not None:
        return compat.no_triton()
    if gpu is None:
        return f"needs an NVIDIA GPU, and this process runs on {jax.default_backend()}"
    if gpu.is_too_old:
        return (
            f"needs compute capability 8.0 (A100) or newer; {gpu.kind} has {gpu.compute_capability}"
        )
    return None

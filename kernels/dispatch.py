"""Which implementation of an op runs.

- "xla": jax.numpy, on any device; the reference of the kernels.
- "triton": the Pallas kernel through its Triton lowering, on NVIDIA GPUs from A100 on (compute
  capability 8.0).
- "interpret": the same kernel in Pallas' interpreter, on any device; slow, for tests.
- "auto": "triton" where the program runs on such a GPU, else "xla".

A named choice is obeyed or refused, never replaced. "auto" takes "xla" where jax has no Triton
lowering and, on a GPU with kernels, for what no kernel here is written for: other dtypes (float64,
or keys of another dtype than queries) and a head_dim above 256. "auto" also refuses arrays of 2^31
elements or more: kernels cannot address them, and XLA may need many times their memory. Pass
implementation="xla" to run them.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from kernels import compat
from kernels.errors import UnsupportedError
from kernels.gpu import Gpu
from kernels.limits import Refusal

Implementation = Literal["auto", "xla", "triton", "interpret"]


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
    if reason is not None:
        raise UnsupportedError(f"{implementation=} {reason}")


def dispatch(
    implementation: Implementation,
    *,
    xla: Callable[[], Any],
    triton: Callable[[bool], Any],
    refusal: Refusal | None,
) -> Any:
    """Run one of an op's implementations.

    Args:
      implementation: the choice.
      xla: runs the XLA version.
      triton: runs the kernel; True asks for the interpreter.
      refusal: why the kernel cannot serve this case; None if it can.

    Raises:
      ValueError: there is no such implementation.
      UnsupportedError: it cannot run here; the message says why.
    """
    check(implementation)
    if implementation in ("triton", "interpret"):
        if refusal is not None:
            raise UnsupportedError(f"{implementation=}: {refusal.reason}")
        return triton(implementation == "interpret")
    if implementation == "xla" or _no_kernels(compat.target_gpu()) is not None:
        return xla()
    if refusal is not None:
        if not refusal.auto_may_use_xla:
            raise UnsupportedError(f"{implementation=}: {refusal.reason}")
        return xla()
    # Decided again when the program is lowered, maybe for another device than the default one.
    return jax.lax.platform_dependent(cuda=lambda: triton(False), default=xla)


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

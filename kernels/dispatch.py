"""Which implementation of an op runs.

- "xla": plain jax.numpy, on any device; the oracle of the tests.
- "triton": the Pallas kernel through its Triton lowering, on NVIDIA GPUs from A100 on.
- "interpret": the same kernel run by Pallas' interpreter, on any device; slow, for tests.
- "auto": "triton" where the program runs on an NVIDIA GPU and the kernel can serve, else "xla".

A named choice is obeyed or refused, never replaced.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from kernels import compat

Implementation = Literal["auto", "xla", "triton", "interpret"]


def dispatch(
    implementation: Implementation,
    *,
    xla: Callable[[], Any],
    triton: Callable[[bool], Any],
    refusal: str | None,
) -> Any:
    """Run one of an op's implementations.

    Args:
      implementation: the choice.
      xla: runs the XLA version.
      triton: runs the kernel; True asks for the interpreter.
      refusal: why the kernel cannot serve this case; None if it can.

    Raises:
      NotImplementedError: the named implementation cannot run here; the message says why.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation=} is not one of {', '.join(get_args(Implementation))}")
    gpu = compat.target_gpu()
    if implementation == "triton" and gpu is None:
        refusal = f"it needs an NVIDIA GPU, and this process runs on {jax.default_backend()}"
    if implementation in ("triton", "interpret"):
        if refusal is not None:
            raise NotImplementedError(f"{implementation=}: {refusal}")
        return triton(implementation == "interpret")
    if implementation == "xla" or gpu is None or refusal is not None:
        return xla()
    # Decided again when the program is lowered: it may be for another device than the default one.
    return jax.lax.platform_dependent(cuda=lambda: triton(False), default=xla)

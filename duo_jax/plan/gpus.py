"""The GPUs that a plan knows: memory, bandwidth and compilation target (figures of kernels.gpu)."""

import dataclasses
import re

from duo_jax.errors import InputError, quoted
from kernels.aot import Target
from kernels.gpu import GPUS as KNOWN

# A program shares the memory with the driver, the libraries and the allocator's gaps: of an
# A100-80G this leaves 83e9 bytes.
_USABLE = 0.975


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedGpu:
    """A GPU, as far as a plan needs it."""

    name: str
    memory: int  # bytes, as the driver reports them
    bandwidth: float | None = None  # bytes per second; None: not known
    target: Target  # which description programs are compiled for: this GPU's, or the nearest one

    @property
    def budget(self) -> int:
        """Bytes that a program may take at its peak."""
        return int(_USABLE * self.memory)


GPUS = {
    name: PlannedGpu(
        name=name,
        memory=gpu.memory,
        bandwidth=gpu.bandwidth,
        target="h200" if gpu.is_hopper else "a100",
    )
    for name, gpu in KNOWN.items()
    if gpu.memory is not None
}
_GIGABYTES = re.compile(r"(\d+(?:\.\d+)?)(?:gb?)?", re.IGNORECASE | re.ASCII)
_MOST_GIGABYTES = 10_000


def find(name: str) -> PlannedGpu:
    """Return a GPU by its name, or one that is only known by its memory in gigabytes (1e9).

    Raises:
      InputError: it is neither.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    number = _GIGABYTES.fullmatch(name)
    if number is None or not 0 < float(number[1]) <= _MOST_GIGABYTES:
        raise InputError(
            f"unknown GPU {quoted(name)}: known are {', '.join(GPUS)}, or a number of "
            "gigabytes such as 24"
        )
    memory = int(float(number[1]) * 1e9)
    return PlannedGpu(name=f"a GPU of {float(number[1]):g} GB", memory=memory, target="a100")

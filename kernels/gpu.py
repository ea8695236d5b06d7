"""The GPUs that kernels run on: the one table of them."""

import dataclasses

RESERVED = 1024  # bytes of shared memory that CUDA takes for itself, for each program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU, from the driver's answers or from its data sheet."""

    kind: str  # the driver's name for it
    num_cores: int  # streaming multiprocessors
    compute_capability: str = ""  # such as "8.0"; empty where only the name is known
    memory: int | None = None  # bytes, as the driver reports them
    bandwidth: float | None = None  # of the memory, bytes per second
    flops: float | None = None  # dense bfloat16 operations per second

    @property
    def is_hopper(self) -> bool:
        """Whether its matrix instructions read shared memory (wgmma), which spares registers."""
        return any(name in self.kind for name in ("H100", "H200", "H800", "H20", "GH200"))

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory of a core; a program of n bytes takes n + RESERVED of them."""
        return (228 if self.is_hopper else 164) * 1024  # NVIDIA's tuning guides, 9.0 and 8.0

    @property
    def is_too_old(self) -> bool:
        """Whether it lacks what the kernels need: bfloat16 matrix instructions, asynchronous loads.

        A GPU of which only the name is known is taken to have them.
        """
        major = self.compute_capability.partition(".")[0]
        return bool(major) and int(major) < 8


# Memory as XLA's descriptions of these devices give it (kernels/gpu_targets has three of them; all
# lie in openxla/xla, target_config/specs); bandwidth and operations as NVIDIA's data sheets
# give them, for the SXM boards.
GPUS: dict[str, Gpu] = {
    "a100-40g": Gpu(
        kind="NVIDIA A100-SXM4-40GB",
        num_cores=108,
        compute_capability="8.0",
        memory=42_331_013_120,
        bandwidth=1555e9,
        flops=312e12,
    ),
    "a100-80g": Gpu(
        kind="NVIDIA A100-SXM4-80GB",
        num_cores=108,
        compute_capability="8.0",
        memory=85_100_068_864,
        bandwidth=2039e9,
        flops=312e12,
    ),
    "h100-80g": Gpu(
        kind="NVIDIA H100 80GB HBM3",
        num_cores=132,
        compute_capability="9.0",
        memory=84_942_979_072,
        bandwidth=3350e9,
        flops=989e12,
    ),
    "h200": Gpu(
        kind="NVIDIA H200",
        num_cores=132,
        compute_capability="9.0",
        memory=151_397_597_184,
        bandwidth=4800e9,
        flops=989e12,
    ),
}
A100 = GPUS["a100-80g"]
H100 = GPUS["h100-80g"]
H200 = GPUS["h200"]
INTERPRETER = Gpu(kind="none", num_cores=1)  # one core: work is not split for its own sake

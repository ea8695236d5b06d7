"""The GPUs that kernels run on."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What tile sizes, and whether there are kernels at all, depend on."""

    kind: str  # as the driver calls it
    num_cores: int  # streaming multiprocessors
    compute_capability: str = ""  # as "8.0"; empty where only the name is known

    @property
    def is_hopper(self) -> bool:
        """Whether its matrix instructions read shared memory (wgmma), which spares registers."""
        return any(name in self.kind for name in ("H100", "H200", "H800", "H20", "GH200"))

    @property
    def is_too_old(self) -> bool:
        """Whether it lacks what the kernels need: bfloat16 matrix instructions, asynchronous loads.

        A GPU that only its name describes is taken for one that has them.
        """
        major = self.compute_capability.partition(".")[0]
        return bool(major) and int(major) < 8


A100 = Gpu(kind="NVIDIA A100-SXM4-80GB", num_cores=108)
H200 = Gpu(kind="NVIDIA H200", num_cores=132)
NONE = Gpu(kind="none", num_cores=1)  # the interpreter's: work is not split for its own sake

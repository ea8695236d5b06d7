"""The GPUs that tile sizes are chosen for."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What tile sizes depend on."""

    kind: str  # as the driver calls it
    num_cores: int  # streaming multiprocessors

    @property
    def is_hopper(self) -> bool:
        """Whether its matrix instructions read shared memory (wgmma), which spares registers."""
        return any(name in self.kind for name in ("H100", "H200", "H800", "H20", "GH200"))


A100 = Gpu(kind="NVIDIA A100-SXM4-80GB", num_cores=108)
H200 = Gpu(kind="NVIDIA H200", num_cores=132)
NONE = Gpu(kind="none", num_cores=1)  # the interpreter's: work is not split for its own sake

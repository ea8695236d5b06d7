"""The static arguments of the streaming kernels."""

import dataclasses

from kernels.tiles import ForwardBackwardTiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingOptions:
    """The static arguments of one call; no sinks and a window of the length are full attention."""

    sink_size: int
    recent_size: int
    softmax_scale: float
    tiles: ForwardBackwardTiles
    interpret: bool

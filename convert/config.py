"""The flags of `python -m convert`."""

import dataclasses
import math
import pathlib
from typing import Annotated, Literal

import tyro

from duo_jax.errors import InputError
from duo_jax.model.quantised_weights import StoredFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert, and how."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """The model: a Hugging Face folder, a hub name such as org/name, or a converted checkpoint."""

    dst: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="DST")]
    """The folder to make; must not exist, or be empty."""

    to_hf: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write Hugging Face safetensors instead of a checkpoint."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type to cast the weights to; without it they stay as they are, bit for bit."""

    weights: StoredFormat = "model"
    """Format of the layers' projections. model: as they are. int8: one scale per output channel,
    served with --weights int8 or w8a8. int4: one scale per output channel and 128 inputs."""

    allow_pickle: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read pickled weights (pytorch_model.bin), for files you trust; needs PyTorch."""

    max_shard_gb: float = 5.0
    """With --to-hf: the size above which weights are split into several files, in GB (1e9)."""

    def __post_init__(self) -> None:
        if self.to_hf and self.weights != "model":
            raise InputError(
                f"--weights {self.weights} is for checkpoints of duo_jax; leave out --to-hf"
            )
        if not 0 < self.max_shard_gb < math.inf:
            raise InputError(f"--max-shard-gb must be positive, not {self.max_shard_gb}")

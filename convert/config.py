"""The flags of `python -m convert`."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro
from msgspec import Meta

from duo_jax.errors import InputError
from duo_jax.model.quantised_weights import StoredFormat
from duo_jax.schema.check import check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Flags of the command."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """The model: a Hugging Face folder, a GGUF file, a hub name such as org/name, or a converted
    checkpoint."""

    dst: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="DST")]
    """The folder to make: a new one, or an empty one."""

    to_hf: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write a Hugging Face folder with safetensors instead of a checkpoint."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Data type to cast the weights to. Default: each tensor keeps its own, bit for bit."""

    weights: StoredFormat = "model"
    """Format of the layers' projections. model: unchanged. int8: 8 bits, one scale per output
    channel; served with --weights int8 or w8a8. int4: 4 bits, one scale per output channel and 128
    inputs. Not with --to-hf: a quantised checkpoint cannot be converted back."""

    allow_pickle: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read pickled weights (pytorch_model.bin) if there are no safetensors. Only for files that you
    trust; needs PyTorch."""

    max_shard_gb: Annotated[float, Meta(gt=0.0, le=1e6)] = 5.0
    """With --to-hf: the largest size of one file of weights, in GB (1e9 bytes)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.to_hf and self.weights != "model":
            raise InputError(
                f"--weights {self.weights} is for checkpoints of duo_jax; leave out --to-hf"
            )

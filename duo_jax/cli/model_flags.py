"""The flags that choose a model, its split into heads, and the formats of its numbers."""

import dataclasses
import sys
from typing import Any, Literal

import jax

from duo_jax.api import DuoModel, load
from duo_jax.cache import KVFormat
from duo_jax.checkpoints import pretrained
from duo_jax.cli.pattern import find_pattern
from duo_jax.mesh.devices import described
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count, Fraction, Share, Size
from duo_jax.serve import PrefillMode
from duo_jax.session.runtime import KeepBy
from kernels import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The arguments of `duo_jax.load` as flags; commands inherit them."""

    model: str = pretrained.DEMO
    """A Hugging Face folder, a GGUF file, a hub name such as org/name, a converted checkpoint, or
    "demo", the model that ships with duo_jax."""
    pattern: str | None = None
    """A pattern folder (python -m train.identify makes one), or "none" for full caches on every
    head, the model as published. Default: the folder "pattern" in the model's own folder, or the
    pattern that ships with duo_jax for this model."""
    sparsity: Fraction | None = None
    """Fraction of streaming heads, 0 to 1. Default: 0.5."""
    threshold: Fraction | None = None
    """Instead of --sparsity: a head whose gate is above this value, 0 to 1, is a retrieval head."""
    sink: Size | None = None
    """Number of first tokens (attention sinks) that a streaming head keeps. Default: the
    pattern's."""
    recent: Count | None = None
    """Number of latest tokens that a streaming head keeps. Default: the pattern's."""

    prefill_chunk: Count = 8192
    """Number of prompt tokens read at a time. A larger chunk is faster and takes more memory."""
    prefill_mode: PrefillMode = "exact"
    """Mask of streaming heads while the prompt is read. exact: sinks and recent tokens, so that the
    result does not depend on the chunk. chunk: also the tokens of the same chunk, as in the
    reference implementation."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Data type of weights, activations and caches. Default: the stored type; float32 on a CPU."""
    weights: WeightFormat = "model"
    """Format of the layers' projections. model: the data type. int8: 8 bits, one scale per output
    channel. w8a8: as int8, with activations in 8 bits too, one scale per token. int4: 4 bits, one
    scale per output channel and 128 inputs. Weights are quantised while they are loaded, unless
    python -m convert has quantised them."""
    kv: KVFormat = "model"
    """Format of the caches. model: the data type. bf16: bfloat16. int8, int4: one scale per token
    and head. int2: keys have a scale per channel in blocks of 64 tokens, and the latest 64 tokens
    stay exact."""
    keep: Share = 1.0
    """Fraction, above 0 and up to 1, of the tokens read that a retrieval head keeps. The others are
    evicted before anything is written, and their memory is freed. Not with --kv int2."""
    keep_by: KeepBy = "snapkv"
    """Which tokens those are. snapkv: what the end of the text looks at; put the question there.
    kvzip: what the model needs to repeat the text, for questions that come later; it takes as long
    as reading the text a second time."""
    devices: Count | None = None
    """Number of devices that share weights, caches and work. Default: all GPUs if one cannot hold
    the weights and a cache of the model's range, else one."""
    groups: Count = 1
    """With --devices, which it must divide: groups of devices that each hold the whole model, and
    serve an equal share of the rows of a batch."""
    implementation: Implementation = "auto"
    """Implementation of attention. auto: triton on an NVIDIA GPU from A100 on (mosaic on an
    H100 or H200 whose jax has no Triton), else xla. triton: our kernels. interpret: our kernels in
    Pallas' interpreter, for tests without a GPU; very slow. mosaic: our kernels for H100 and H200,
    with jax 0.11; interpret_mosaic: these on a CPU, with jax 0.12."""

    def __post_init__(self) -> None:
        check_fields(self)

    def load(self, **changes: Any) -> DuoModel:
        """Load the model, with some flags changed.

        Raises:
          InputError: as `duo_jax.load`.
        """
        flags = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelFlags)}
        flags |= changes
        if flags["pattern"] is None:
            folder = pretrained.resolve(flags["model"])
            flags["pattern"] = str(find_pattern(folder, pretrained.load_config(folder)))
        model = load(sink_size=flags.pop("sink"), recent_size=flags.pop("recent"), **flags)
        if len(jax.devices()) > 1:
            print(f"[on {described(model.runtime.mesh)}]", file=sys.stderr)
        return model

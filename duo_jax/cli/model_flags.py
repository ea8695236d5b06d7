"""The flags by which every command chooses a model, its split, and what its numbers take."""

import dataclasses
from typing import Any, Literal

from duo_jax.api import DuoModel, load
from duo_jax.cache import KVFormat
from duo_jax.checkpoints import pretrained
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.serve import PrefillMode
from kernels import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Flags that `duo_jax.load` takes, under its names; commands inherit them."""

    model: str = pretrained.DEMO
    """A Hugging Face folder, a hub name, a converted checkpoint, or "demo" (ships with duo_jax)."""
    pattern: str | None = None
    """A pattern folder (python -m train.identify makes one), or "none" for the model as published,
    every head with a full cache. Default: the pattern that the model's folder brings."""
    sparsity: float | None = None
    """Fraction of streaming heads, 0 to 1. Default: 0.5."""
    threshold: float | None = None
    """Instead of --sparsity: the gate above which a head is a retrieval head."""
    sink: int | None = None
    """First tokens a streaming head keeps. Default: the pattern's."""
    recent: int | None = None
    """Latest tokens a streaming head keeps. Default: the pattern's."""

    prefill_chunk: int = 8192
    """Tokens of the prompt that are read at a time: more is faster and takes more memory."""
    prefill_mode: PrefillMode = "exact"
    """What streaming heads see while the prompt is read. exact: sinks and recent tokens, so that
    the result does not depend on the chunk. chunk: also all of the token's own chunk, as in the
    reference implementation."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of weights, activations and caches. Default: as stored; float32 on a CPU."""
    weights: WeightFormat = "model"
    """Format of the layers' projections. model: --dtype. int8: one scale per output channel. w8a8:
    these, and activations in int8 too, one scale per token. int4: one scale per output channel and
    128 inputs. Quantised while loading, unless python -m convert has done so."""
    kv: KVFormat = "model"
    """Format of the caches. model: --dtype. int8, int4: one scale per token and head. int2: keys by
    channel in blocks of 64 tokens, the latest 64 tokens exactly."""
    implementation: Implementation = "auto"
    """Of attention. auto: our kernels on an NVIDIA GPU, XLA elsewhere. interpret: the kernels run
    by Pallas' interpreter, to test them without a GPU; very slow."""

    def load(self, **changes: Any) -> DuoModel:
        """Load the model, with some flags changed.

        Raises:
          InputError: as `duo_jax.load`.
        """
        flags = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelFlags)}
        flags |= changes
        return load(sink_size=flags.pop("sink"), recent_size=flags.pop("recent"), **flags)

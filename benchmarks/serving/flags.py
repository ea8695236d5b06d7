"""The flags that the benchmarks of serving share."""

import dataclasses
import pathlib
from typing import Literal

from benchmarks.serving import shapes, variants
from benchmarks.serving.rivals import KVPRESS_PYTHON, Library
from benchmarks.serving.variants import Variant
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingFlags:
    """Which models, which splits, which other libraries."""

    geometries: tuple[shapes.Geometry, ...] = ("gqa", "mha")
    """Attention of Llama-3-8B (gqa: 32 query, 8 KV heads of 128) and Llama-2-7B (mha: 32, 32)."""
    layers: int = 4
    """Decoder layers; the published models have 32. The vocabulary shrinks with them."""
    embed: int = 4096
    """Model width; the published models have 4,096. The MLP shrinks with it."""
    q_heads: int = 32
    """Query heads; fewer take KV heads along."""
    retrieval: tuple[float, ...] = (0.5, 0.25)
    """Fractions of retrieval heads."""
    sink: int = 128
    """Sinks of the streaming heads."""
    recent: int = 256
    """Recent tokens of the streaming heads."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of weights, activations and caches."""
    rivals: tuple[Library, ...] = ("transformers", "kvpress")
    """Other libraries to measure (on CPU)."""
    kvpress_python: pathlib.Path = KVPRESS_PYTHON
    """Interpreter of kvpress' own environment; benchmarks/serving/rivals.py says how to make it."""
    models: pathlib.Path = pathlib.Path("runs/benchmark-models")
    """Where random models are kept between runs (gigabytes)."""

    def __post_init__(self) -> None:
        if not self.geometries or min(self.layers, self.embed, self.q_heads) < 1:
            raise InputError("a model has an attention geometry, layers, a width and query heads")
        if not all(0 <= fraction < 1 for fraction in self.retrieval):
            raise InputError("fractions of retrieval heads lie in [0, 1)")

    def model(self, geometry: shapes.Geometry) -> ModelConfig:
        """Return the model of one geometry."""
        return shapes.model_config(
            geometry, layers=self.layers, embed=self.embed, q_heads=self.q_heads
        )

    def variants(self, model: ModelConfig) -> list[Variant]:
        """Return the model with full caches, then its splits."""
        return variants.variants(
            model, self.retrieval, sink_size=self.sink, recent_size=self.recent
        )

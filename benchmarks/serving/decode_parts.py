"""A split model and its attention part, which decode into one cache."""

import dataclasses
from typing import Any

import jax
from jax.typing import DTypeLike

from benchmarks.serving import shapes, variants
from benchmarks.serving.variants import Decoder
from duo_jax.cache import Cache
from duo_jax.heads.split import DuoConfig


class StepAndAttention:
    """Decodes one token after another from a context of random keys and values.

    Args:
      config: the split model.
      params: its parameters.
      attention_params: of its attention part, a model of the same attention and width 2.
      context: tokens in the cache.
      max_len: tokens that it can hold; both parts decode into it.
      dtype: of parameters and activations.
      kv: format of the cache.
    """

    def __init__(
        self,
        config: DuoConfig,
        params: dict[str, Any],
        attention_params: dict[str, Any],
        *,
        context: int,
        max_len: int,
        dtype: DTypeLike,
        kv: str = "model",
    ) -> None:
        self.cache = variants.filled_cache(
            config, context=context, max_len=max_len, dtype=dtype, kv=kv
        )
        only = dataclasses.replace(config, architecture=shapes.attention_only(config.architecture))
        self._step = Decoder(config, params, self.cache)
        self._attention = Decoder(only, attention_params, self.cache)
        self._buffers = _pointers(self.cache)

    def step(self) -> None:
        self.cache = self._step.step(self.cache)

    def attention(self) -> None:
        self.cache = self._attention.step(self.cache)

    @property
    def in_place(self) -> bool:
        """Whether the cache still lies where it was made."""
        return _pointers(self.cache) == self._buffers

    @property
    def temp_bytes(self) -> int:
        return self._step.temp_bytes


def _pointers(cache: Cache) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)}

"""Memory of a setting at a context, the longest context that fits, and the least time of a step."""

import dataclasses
import functools
from typing import Any

from duo_jax.cache import cache_shapes
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh.devices import abstract_mesh
from duo_jax.mesh.weights import shardings
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.plan.settings import Setting
from duo_jax.plan.workspace import workspace_bytes
from duo_jax.serve.ahead_of_time import param_shapes, placed, tree_bytes
from kernels.packed import BLOCK

_LONGEST = 1 << 31  # tokens of a row; positions are 32-bit numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """How the model is served, in all settings of a plan."""

    config: DuoConfig  # the split model
    dtype: str = "bfloat16"
    batch_size: int = 1
    chunk: int = 32_000  # tokens of a prompt, per row, that are read at a time
    devices: int = 1  # GPUs that share weights and full caches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes at the peak on a GPU, by what they hold."""

    weights: int
    full_cache: int
    streaming_cache: int
    workspace: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.full_cache + self.streaming_cache + self.workspace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The bytes of one setting on each GPU, as functions of the context; made by `estimate`."""

    workload: Workload
    setting: Setting
    weights: int
    weights_read: int  # by one decode step, which reads one embedding row per token
    full_cache_fixed: int  # the latest tokens of "int2", which every GPU holds
    full_cache_per_block: int  # 64 tokens of every row, which one GPU holds
    streaming_cache: int

    @property
    def config(self) -> DuoConfig:
        """The split that the setting serves."""
        return _served(self.workload.config, self.setting)

    @property
    def block(self) -> int:
        """Tokens that a full cache grows by: on several GPUs, a stripe of each."""
        devices = self.workload.devices
        return BLOCK * devices if devices > 1 or self.setting.kv == "int2" else 1

    def parts(self, context: int) -> Parts:
        """Return the peak at `context` tokens per row: that of a chunk or a decode step."""
        workload, architecture = self.workload, self.workload.config.architecture
        slots = -(-context // self.block) * self.block // workload.devices
        channels = 2 * max(self.config.retrieval_counts) * architecture.head_dim  # keys and values
        return Parts(
            weights=self.weights,
            full_cache=self.full_cache_fixed + self.full_cache_per_block * slots // BLOCK,
            streaming_cache=self.streaming_cache,
            workspace=workspace_bytes(
                architecture,
                chunk=min(workload.chunk, context),
                batch_size=workload.batch_size,
                dtype=workload.dtype,
                weights=self.setting.weights,
                kv=self.setting.kv,
                cached=workload.batch_size * slots * channels,
                devices=workload.devices,
            ),
        )

    def longest(self, budget: int) -> int | None:
        """Return the most tokens per row that fit; None if not even one does, by bisection."""
        fits, too_long = 0, 1
        while too_long < _LONGEST and self.parts(too_long).total <= budget:
            fits, too_long = too_long, 2 * too_long
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.parts(middle).total <= budget:
                fits = middle
            else:
                too_long = middle
        return fits // self.block * self.block or None

    def decode_floor(self, context: int, bandwidth: float) -> float:
        """Return the least seconds of a decode step, which appends a token to every row.

        Every weight is read once for all rows, every cached key and value once.

        Args:
          context: tokens in every row's cache.
          bandwidth: bytes per second of the GPU's memory.
        """
        return (self.weights_read + self.cache_read(context)) / bandwidth

    def cache_read(self, context: int) -> int:
        """Return the bytes of keys and values that a decode step reads at `context` tokens."""
        parts, slots = self.parts(context), self.workload.config.ring_slots
        return parts.full_cache + parts.streaming_cache * min(context, slots) // slots


def estimate(workload: Workload, setting: Setting) -> Estimate:
    """Count the bytes of a setting from shapes alone; nothing is allocated.

    Raises:
      InputError: the model cannot have these weights or this cache.
    """
    served = _served(workload.config, setting)
    rows = {"batch_size": workload.batch_size, "dtype": workload.dtype, "kv": setting.kv}
    one, two = (_cache_bytes(served, max_len=BLOCK * blocks, **rows) for blocks in (1, 2))
    weights, embedding = _weight_bytes(
        served.architecture, workload.dtype, setting.weights, workload.devices
    )
    vocab_size = served.architecture.vocab_size
    unread = 0 if served.architecture.tie_embeddings else vocab_size - workload.batch_size
    return Estimate(
        workload=workload,
        setting=setting,
        weights=weights,
        weights_read=weights - embedding * max(unread, 0) // vocab_size,
        full_cache_fixed=2 * one[0] - two[0],
        full_cache_per_block=two[0] - one[0],
        streaming_cache=one[1],
    )


def _served(config: DuoConfig, setting: Setting) -> DuoConfig:
    return config if setting.duo else config.all_retrieval()


@functools.cache
def _weight_bytes(
    model: ModelConfig, dtype: str, weights: WeightFormat, devices: int
) -> tuple[int, int]:
    """Return the bytes of all weights on a GPU, and of the embedding among them."""
    shapes = param_shapes(model, dtype, weights=weights)
    if devices > 1:
        shapes = placed(shapes, shardings(abstract_mesh(devices), shapes))
    return tree_bytes(shapes), tree_bytes(shapes["embed_tokens"])


def _cache_bytes(served: DuoConfig, **sizes: Any) -> tuple[int, int]:
    """Return the bytes of all full and of all streaming caches; `sizes` as in `cache_shapes`."""
    full, streaming = _head_bytes(
        dataclasses.replace(
            served,
            architecture=dataclasses.replace(
                served.architecture, num_layers=1, num_q_heads=2, num_kv_heads=2
            ),
            retrieval_counts=(1,),
        ),
        **sizes,
    )
    num_heads = served.architecture.num_layers * served.architecture.num_kv_heads
    num_full = served.num_retrieval_heads
    return num_full * full, (num_heads - num_full) * streaming


@functools.cache
def _head_bytes(one_of_each: DuoConfig, **sizes: Any) -> tuple[int, int]:
    """Return the bytes of the caches of a retrieval and of a streaming head.

    Args:
      one_of_each: a model of these two heads; a larger one would take long to describe, and every
        other head has one of their shapes.
      **sizes: as in `cache_shapes`.
    """
    (layer,) = cache_shapes(one_of_each, **sizes).layers
    return tree_bytes(layer.full), tree_bytes(layer.streaming)

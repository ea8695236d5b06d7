"""The two KV caches: full ones for retrieval heads, sinks with a ring for streaming heads."""

from duo_jax.cache.evict import LATEST, evict, without_votes
from duo_jax.cache.rewind import Mark, mark, rewind
from duo_jax.cache.sizes import cache_bytes, cache_shapes, device_bytes, live_bytes
from duo_jax.cache.state import (
    Cache,
    KVCache,
    KVFormat,
    LayerCache,
    check_kv_format,
    grow,
    init_cache,
    with_lengths,
)

__all__ = [
    "LATEST",
    "Cache",
    "KVCache",
    "KVFormat",
    "LayerCache",
    "Mark",
    "cache_bytes",
    "cache_shapes",
    "check_kv_format",
    "device_bytes",
    "evict",
    "grow",
    "init_cache",
    "live_bytes",
    "mark",
    "rewind",
    "with_lengths",
    "without_votes",
]

"""How large an engine's caches are; they are allocated once, and never grow."""

import dataclasses
from typing import Any

import jax

from duo_jax.cache import cache_bytes
from duo_jax.errors import InputError
from duo_jax.mesh.devices import num_groups, num_parts
from duo_jax.schema.check import argument
from duo_jax.schema.kinds import Count, Size
from duo_jax.session import memory
from duo_jax.session.runtime import Runtime
from kernels.packed import BLOCK

# Of the memory that is free once weights are loaded. Kernels and XLA need the rest of a GPU; other
# programs run beside us on a CPU.
_SHARE = {"gpu": 0.85, "cpu": 0.25}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows, pages and tokens of an engine."""

    max_requests: int  # that run at a time: rows
    max_len: int  # tokens of a request, prompt and answer
    num_pages: int
    page_size: int
    snapshots: int  # rows of rings that are kept with prefixes
    prefill_chunk: int

    @property
    def buckets(self) -> tuple[int, ...]:
        """Rows that decoding programs are made for: 1, 4, 16, ..., and all."""
        powers = (4**n for n in range(16))
        return (*(rows for rows in powers if rows < self.max_requests), self.max_requests)


def choose_sizes(
    runtime: Runtime,
    *,
    max_requests: int,
    max_len: int | None,
    cache_tokens: int | None,
    page_size: int,
    snapshots: int,
    prefill_chunk: int | None,
) -> Sizes:
    """Return the sizes that were asked for, with the rest chosen for this model and machine.

    Args:
      runtime: the model.
      max_requests: requests that run at a time.
      max_len: tokens of a request; default: the model's range, or what fits.
      cache_tokens: tokens of all requests and kept prefixes together; default: what fits into a
        share of the memory, at most as many as all requests could have.
      page_size: tokens of a page.
      snapshots: snapshots of streaming heads' rings, one for each kept prefix.
      prefill_chunk: tokens of a prompt that are read between two tokens of the others; default:
        the model's, at most 1,024.

    Raises:
      InputError: an argument cannot be used, or a request of `max_len` would not fit, or is beyond
        the model's range.
    """
    max_requests = argument("max_requests", max_requests, Count)
    snapshots = argument("snapshots", snapshots, Size)
    page_size = argument("page_size", page_size, Count)
    if page_size < BLOCK or page_size & (page_size - 1):
        raise InputError(f"page_size {page_size} is not a power of two from {BLOCK}")
    if num_groups(runtime.mesh) > 1:
        raise InputError("an engine's devices share every page: load the model without groups")
    page_size *= num_parts(runtime.mesh)  # of which every device has as much as one alone
    chunk = min(runtime.prefill_chunk, 1024) if prefill_chunk is None else prefill_chunk
    in_range = runtime.config.architecture.max_positions
    if max_len is not None:
        asked = argument("max_len", max_len, Count)
        if asked > in_range:
            raise InputError(
                f"max_len {asked:,} is beyond the model's range of {in_range:,} tokens"
            )
        max_len = asked
    if cache_tokens is None:
        most = max_requests * (max_len or in_range)
        rows = max_requests + snapshots
        num_pages = min(_pages_that_fit(runtime, page_size, rows), -(-most // page_size))
    else:
        num_pages = argument("cache_tokens", cache_tokens, Count) // page_size
    if not num_pages:
        raise InputError(f"the cache has room for less than a page of {page_size} tokens")
    longest = max_len or min(in_range, num_pages * page_size)
    if longest > num_pages * page_size:
        raise InputError(
            f"a request of max_len {longest:,} does not fit into a cache of "
            f"{num_pages * page_size:,} tokens"
        )
    return Sizes(
        max_requests=max_requests,
        max_len=longest,
        num_pages=num_pages,
        page_size=page_size,
        snapshots=snapshots,
        prefill_chunk=argument("prefill_chunk", chunk, Count),
    )


def bytes_of(runtime: Runtime, *, page_size: int, full: bool = False) -> tuple[int, int]:
    """Return the bytes of a page in all layers, and of a row of rings.

    Args:
      runtime: the model.
      page_size: tokens of a page.
      full: with full caches in all heads instead.
    """
    config = runtime.config.all_retrieval() if full else runtime.config
    some: dict[str, Any] = {
        "max_len": page_size,
        "dtype": runtime.dtype,
        "kv": runtime.kv_format,
        "page_size": page_size,
    }
    one = cache_bytes(config, batch_size=1, num_pages=1, **some)
    page = cache_bytes(config, batch_size=1, num_pages=2, **some) - one
    return page, one - page


def _pages_that_fit(runtime: Runtime, page_size: int, rows: int) -> int:
    page, ring = bytes_of(runtime, page_size=page_size)
    page //= num_parts(runtime.mesh)
    total = memory.device_memory()
    if total is None:
        raise InputError("this device does not tell its memory; cache_tokens is needed")
    device = jax.devices()[0]
    used = (device.memory_stats() or {}).get("bytes_in_use", 0) if device.platform != "cpu" else 0
    share = _SHARE["cpu" if device.platform == "cpu" else "gpu"]
    left = int(share * (total - used)) - rows * ring
    if not page:  # no retrieval head: pages hold nothing
        return 1 << 20
    return max(left // page, 0)

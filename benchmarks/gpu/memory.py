"""The device's memory: live arrays, peak and limit."""

from typing import Any

import jax

# Fraction of the limit that a program may take: the allocator needs some room to move.
_USABLE = 0.97


def limit() -> int | None:
    """Return the bytes that this process may take on its device; None where it does not say."""
    return _stats().get("bytes_limit")


def in_use() -> int:
    """Return the bytes that live arrays take."""
    stats = _stats()
    if "bytes_in_use" in stats:
        return stats["bytes_in_use"]
    return sum(array.nbytes for array in jax.live_arrays())


def peak() -> int | None:
    """Return the most bytes that were ever taken by this process."""
    return _stats().get("peak_bytes_in_use")


def fits(num_bytes: float) -> bool:
    """Whether so many bytes can be asked for."""
    most = limit()
    return most is None or num_bytes <= _USABLE * most


class Watch:
    """Memory of one program: live arrays, its workspace, and the peak if it is a new maximum.

    The device counts one peak for the whole process, so it says something about this program only
    if it rose.
    """

    def __init__(self) -> None:
        self._before = peak()

    def report(self, *, temp_bytes: int) -> dict[str, int | None]:
        """Return the figures; call it while parameters and cache are alive."""
        after, lying = peak(), in_use()
        rose = after is not None and self._before is not None and after > self._before
        return {
            "in_use_bytes": lying,
            "temp_bytes": temp_bytes,
            "counted_bytes": lying + temp_bytes,
            "peak_bytes": after if rose else None,
        }


def compare(duo: dict[str, Any], full: dict[str, Any]) -> None:
    """Put the ratios of two rows' memory into the split model's."""
    if "memory" not in duo or "memory" not in full:
        return
    for ratio, key in (
        ("memory_ratio", "peak_bytes"), ("counted_memory_ratio", "counted_bytes")
    ):  # fmt: skip
        if duo["memory"][key] and full["memory"][key]:
            duo[ratio] = full["memory"][key] / duo["memory"][key]


def _stats() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {}

"""Cases over a KV cache, as it is or packed."""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int

from kernels import dense, packed
from kernels.case import AttentionCase, to_numpy
from kernels.packed import INT2_KEYS, INT2_VALUES, INT4, INT8, Layout, Packed

# Layouts of keys and values, by bits.
LAYOUTS: dict[int, tuple[Layout, Layout]] = {
    8: (INT8, INT8),
    4: (INT4, INT4),
    2: (INT2_KEYS, INT2_VALUES),
}
Cached = TypeVar("Cached", bound="CachedCase")
_STALE_SCALE = 100.0  # in float16, 255 times this number is finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedCase(AttentionCase):
    """A call on queries, keys, values and one integer per row."""

    slots: int
    bits: int | None = None  # of packed keys and values; None: they are not packed
    page_size: int | None = None  # of a paged cache

    @property
    def kv_bytes(self) -> float:
        if self.bits is None:
            return super().kv_bytes
        return sum(layout.bytes_per_token(self.head_dim) for layout in LAYOUTS[self.bits])

    @property
    def layout(self) -> Layout | None:
        """The layout of keys, on which tile sizes depend."""
        return None if self.bits is None else LAYOUTS[self.bits][0]

    def cache(self, batch: int) -> tuple[Any, Any]:
        """Return descriptions of keys and values, or of pools with just as many pages."""
        rows, slots = batch, self.slots
        if self.page_size is not None:
            rows, slots = batch * self.slots // self.page_size, self.page_size
        shape = (rows, self.kv_heads, slots, self.head_dim)
        if self.bits is None:
            return self.array(*shape), self.array(*shape)
        return tuple(
            jax.eval_shape(functools.partial(packed.zeros, shape, layout))
            for layout in LAYOUTS[self.bits]
        )

    def table(self, batch: int) -> list[Int[np.ndarray, "batch most_pages"]]:
        """Return the pages of a paged cache, if it is one: all of the pool's, in random order."""
        if self.page_size is None:
            return []
        per_row = self.slots // self.page_size
        order = np.random.default_rng(0).permutation(batch * per_row)
        return [order.astype(np.int32).reshape(batch, per_row)]

    def rows_of(
        self, arguments: tuple[Any, ...]
    ) -> tuple[Float[np.ndarray, "batch kv_heads slots head_dim"], ...]:
        """Return keys and values with a row for every row, given numpy arguments, unpacked."""
        _, k, v, _, *table = arguments
        return (k, v) if not table else tuple(_together(x, table[0]) for x in (k, v))

    def with_stale(
        self, arguments: tuple[Any, ...], *, keys: float = dense.STALE, values: float = -dense.STALE
    ) -> tuple[Any, ...]:
        if self.page_size is not None:
            return arguments
        q, k, v, integers = arguments
        (part,) = self.parts(to_numpy(arguments))
        if self.bits is None:
            return q, *part.stale(keys, values), integers
        return q, *(_with_stale_scales(x, np.any(part.mask, axis=1)) for x in (k, v)), integers


def _together(
    pool: Float[np.ndarray, "pages kv_heads page_size head_dim"],
    table: Int[np.ndarray, "batch most_pages"],
) -> Float[np.ndarray, "batch kv_heads slots head_dim"]:
    """Return the rows of a paged cache with their slots in order."""
    rows = np.swapaxes(pool[table], 1, 2)
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])


def _with_stale_scales(x: Packed, seen: np.ndarray) -> Packed:
    """Return packed numbers with stale scales where no query sees any number of theirs."""
    of_scales = np.any(seen.reshape(len(seen), x.scales.shape[2], -1), axis=2)[:, None, :, None]
    scales, zeros = (
        jax.device_put(np.where(of_scales, y, np.float16(_STALE_SCALE)))
        for y in (x.scales, x.zeros)
    )
    return dataclasses.replace(x, scales=scales, zeros=zeros)


def per_format(cases: dict[str, Cached]) -> dict[str, Cached]:
    """Return the cases with keys and values in 8, 4 and 2 bits."""
    return {
        f"int{bits}, {name}": dataclasses.replace(case, bits=bits)
        for bits in LAYOUTS
        for name, case in cases.items()
    }

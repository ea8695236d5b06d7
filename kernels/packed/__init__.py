"""Keys and values in few bits: how they are stored, and attention that reads them as they are."""

from kernels.packed.layout import (
    BLOCK,
    INT2_KEYS,
    INT2_VALUES,
    INT4,
    INT8,
    Layout,
    Packed,
    layout_of,
    pack,
    read_slots,
    unpack,
    zeros,
)

__all__ = [
    "BLOCK",
    "INT2_KEYS",
    "INT2_VALUES",
    "INT4",
    "INT8",
    "Layout",
    "Packed",
    "layout_of",
    "pack",
    "read_slots",
    "unpack",
    "zeros",
]

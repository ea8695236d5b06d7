"""Named cases of attention over packed keys and values: those of decode and prefill, packed."""

import dataclasses
import functools
from typing import Any

import jax

from kernels.decode.cases import DecodeCase
from kernels.decode.config import BlockSizes as DecodeBlockSizes
from kernels.gpu import Gpu
from kernels.packed import config, layout
from kernels.packed.layout import INT2_KEYS, INT2_VALUES, INT4, INT8, Layout
from kernels.prefill.cases import PrefillCase
from kernels.tiles import BlockSizes, cdiv, width

LAYOUTS: dict[int, tuple[Layout, Layout]] = {
    8: (INT8, INT8),
    4: (INT4, INT4),
    2: (INT2_KEYS, INT2_VALUES),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Packed:
    """Keys and values of another case in `bits` bits."""

    bits: int

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        return LAYOUTS[self.bits]

    @property
    def kv_bytes(self) -> float:
        return sum(x.bytes_per_token(self.head_dim) for x in self.layouts)

    def shapes(self) -> tuple[Any, ...]:
        q, k, v, integers = super().shapes()
        packed = (
            jax.eval_shape(functools.partial(layout.zeros, shape.shape, chosen))
            for shape, chosen in zip((k, v), self.layouts, strict=True)
        )
        return q, *packed, integers

    @property
    def columns(self) -> int:
        fields = self.layouts[0].fields
        return fields * width(self.head_dim // fields)

    def loaded_bytes(self, num_tokens: int, block_kv: int) -> float:
        """Return bytes as the kernels load them: words that tokens share, once for each."""
        size = 0.0
        for chosen in self.layouts:
            size += 4 * num_tokens * self.head_dim // chosen.fields
            times = cdiv(num_tokens, block_kv if chosen.by == "channel" else 1)
            size += 4 * times * chosen.num_scales(self.head_dim)
        return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedDecodeCase(_Packed, DecodeCase):
    """Decoding over packed keys and values."""

    def block_sizes(self, *, gpu: Gpu) -> DecodeBlockSizes:
        return config.decode_heuristic(
            batch=len(self.lengths),
            kv_heads=self.kv_heads,
            slots=self.slots,
            head_dim=self.head_dim,
            dtype=self.dtype,
            layout=self.layouts[0],
            gpu=gpu,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedPrefillCase(_Packed, PrefillCase):
    """A chunk over packed keys and values."""

    def block_sizes(self, *, gpu: Gpu) -> BlockSizes:  # noqa: ARG002
        return config.prefill_heuristic(
            head_dim=self.head_dim, dtype=self.dtype, layout=self.layouts[0]
        )


_LLAMA_3_8B = {"q_heads": 16, "kv_heads": 4, "compile_only": True}  # 4 retrieval heads of a layer


def _per_format(make) -> dict[str, Any]:
    return {f"int{bits}, {name}": case for bits in LAYOUTS for name, case in make(bits).items()}


DECODE: dict[str, PackedDecodeCase] = _per_format(
    lambda bits: {
        "empty rows": PackedDecodeCase(
            bits=bits, lengths=(0, 5, 0), slots=128, q_heads=4, kv_heads=2, head_dim=64
        ),
        "ragged rows": PackedDecodeCase(
            bits=bits, lengths=(1, 1025, 97, 64), slots=1088, q_heads=8, kv_heads=2
        ),
        "group of 7, head_dim 80": PackedDecodeCase(
            bits=bits, lengths=(97, 96), slots=128, q_heads=14, kv_heads=2, head_dim=80
        ),
        "head_dim 256, float16": PackedDecodeCase(
            bits=bits, lengths=(300,), slots=320, q_heads=4, kv_heads=1, head_dim=256,
            dtype="float16",
        ),
        "float32": PackedDecodeCase(
            bits=bits, lengths=(333,), slots=384, q_heads=8, kv_heads=2, dtype="float32"
        ),
        "llama-3-8b, 4 retrieval heads at 500K": PackedDecodeCase(
            bits=bits, lengths=(500_000,), slots=500_032, **_LLAMA_3_8B
        ),
    }
)  # fmt: skip
DECODE["int4, llama-3-8b, 8 retrieval heads at 4M"] = PackedDecodeCase(
    bits=4, lengths=(4_000_000,), slots=4_000_000, q_heads=32, kv_heads=8, compile_only=True
)

PREFILL: dict[str, PackedPrefillCase] = _per_format(
    lambda bits: {
        "three tokens, one before the start": PackedPrefillCase(
            bits=bits, offsets=(-1, 30, 61), length=3, slots=64, q_heads=4, kv_heads=2, head_dim=64
        ),
        "group of 7, head_dim 80": PackedPrefillCase(
            bits=bits, offsets=(31, 0), length=65, slots=128, q_heads=7, kv_heads=1, head_dim=80
        ),
        "more than one block": PackedPrefillCase(
            bits=bits, offsets=(150,), length=131, slots=320, q_heads=4, kv_heads=2
        ),
        "head_dim 256, float16": PackedPrefillCase(
            bits=bits, offsets=(10,), length=70, slots=128, q_heads=2, kv_heads=1, head_dim=256,
            dtype="float16",
        ),
        "float32": PackedPrefillCase(
            bits=bits, offsets=(64,), length=97, slots=192, q_heads=4, kv_heads=1, dtype="float32"
        ),
        "llama-3-8b, 4 retrieval heads, 32K at 288K": PackedPrefillCase(
            bits=bits, offsets=(288_000,), length=32_000, slots=320_000, **_LLAMA_3_8B
        ),
    }
)  # fmt: skip

"""Named cases of prefill attention."""

import dataclasses

import numpy as np

from kernels.case import Case, Cost, per_row
from kernels.gpu import Gpu
from kernels.prefill.api import prefill
from kernels.prefill.config import heuristic
from kernels.tiles import BlockSizes, cdiv


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillCase(Case):
    """`length` new tokens per row, at `offsets`, over `slots` slots."""

    offsets: tuple[int, ...]
    length: int
    slots: int

    def shapes(self):
        batch = len(self.offsets)
        kv = self.array(batch, self.kv_heads, self.slots, self.head_dim)
        q = self.array(batch, self.length, self.q_heads, self.head_dim)
        return q, kv, kv, per_row(batch)

    def integers(self):
        return [np.array(self.offsets)]

    def run(self, *arguments, implementation, block_sizes=None):
        return prefill(
            *arguments,
            softmax_scale=self.softmax_scale,
            implementation=implementation,
            block_sizes=block_sizes,
        )

    def block_sizes(self, *, gpu: Gpu) -> BlockSizes:
        return heuristic(length=self.length, head_dim=self.head_dim, dtype=self.dtype, gpu=gpu)

    def cost(self, *, gpu: Gpu) -> Cost:
        sizes = self.block_sizes(gpu=gpu)
        pairs = sum(
            self.length * offset + self.length * (self.length + 1) // 2 for offset in self.offsets
        )
        # Ends of all the key tiles that the programs of one head load, the last one's past slots.
        ends = [
            cdiv(min(offset + first + sizes.block_q, self.slots), sizes.block_kv) * sizes.block_kv
            for offset in self.offsets
            for first in range(0, self.length, sizes.block_q)
        ]
        loaded = self.q_heads * sum(
            self.loaded_bytes(min(end, self.slots), sizes.block_kv) for end in ends
        )
        vectors = len(self.offsets) * self.length * self.q_heads
        seen = sum(offset + self.length for offset in self.offsets)
        outputs = vectors * (2 * self.vector_bytes + 4)
        return Cost(
            flops=4.0 * pairs * self.q_heads * self.head_dim,
            num_bytes=outputs + seen * self.kv_heads * self.kv_bytes,
            scheduled_flops=4.0 * sum(ends) * sizes.block_q * self.q_heads * self.columns,
            scheduled_bytes=outputs + loaded,
        )


CASES: dict[str, PrefillCase] = {
    "one token": PrefillCase(offsets=(0,), length=1, slots=40, q_heads=4, kv_heads=2, head_dim=64),
    "three tokens, ragged": PrefillCase(
        offsets=(0, 30, 37), length=3, slots=40, q_heads=4, kv_heads=2, head_dim=64
    ),
    "group of 7, odd length": PrefillCase(
        offsets=(5, 0), length=97, slots=102, q_heads=14, kv_heads=2, head_dim=64
    ),
    "group of 1, head_dim 80": PrefillCase(
        offsets=(31,), length=65, slots=128, q_heads=3, kv_heads=3, head_dim=80
    ),
    "more than one block": PrefillCase(
        offsets=(150, 3), length=259, slots=500, q_heads=8, kv_heads=2
    ),
    "float16": PrefillCase(
        offsets=(64,), length=129, slots=256, q_heads=4, kv_heads=1, dtype="float16"
    ),
    "float32": PrefillCase(
        offsets=(64,), length=129, slots=256, q_heads=4, kv_heads=1, dtype="float32"
    ),
    "float32, head_dim 64, odd length": PrefillCase(
        offsets=(0,), length=1001, slots=1001, q_heads=1, kv_heads=1, head_dim=64, dtype="float32"
    ),
    "head_dim 96": PrefillCase(
        offsets=(10,), length=70, slots=80, q_heads=4, kv_heads=1, head_dim=96
    ),
    "head_dim 256": PrefillCase(
        offsets=(10,), length=70, slots=80, q_heads=8, kv_heads=1, head_dim=256
    ),
    "llama-3-8b, all heads, first 32K": PrefillCase(
        offsets=(0,), length=32_000, slots=32_000, q_heads=32, kv_heads=8, compile_only=True
    ),
    "llama-3-8b, 4 retrieval heads, 32K at 288K": PrefillCase(
        offsets=(288_000,), length=32_000, slots=320_000, q_heads=16, kv_heads=4, compile_only=True
    ),
    "llama-2-7b, 8 retrieval heads, 10K at 90K": PrefillCase(
        offsets=(90_000,), length=10_000, slots=100_000, q_heads=8, kv_heads=8, compile_only=True
    ),
}

"""Named cases of decode attention."""

import dataclasses

import numpy as np

from kernels.case import Case, Cost, per_row
from kernels.decode.api import decode
from kernels.decode.config import BlockSizes, heuristic
from kernels.gpu import Gpu
from kernels.tiles import MIN_ROWS, cdiv, power_of_two


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCase(Case):
    """One query per row over `slots` slots, of which `lengths` are filled."""

    lengths: tuple[int, ...]
    slots: int

    def shapes(self):
        batch = len(self.lengths)
        kv = self.array(batch, self.kv_heads, self.slots, self.head_dim)
        return self.array(batch, self.q_heads, self.head_dim), kv, kv, per_row(batch)

    def integers(self):
        return [np.array(self.lengths)]

    def run(self, *arguments, implementation, block_sizes=None):
        return decode(
            *arguments,
            softmax_scale=self.softmax_scale,
            implementation=implementation,
            block_sizes=block_sizes,
        )

    def block_sizes(self, *, gpu: Gpu) -> BlockSizes:
        return heuristic(
            batch=len(self.lengths),
            kv_heads=self.kv_heads,
            slots=self.slots,
            head_dim=self.head_dim,
            dtype=self.dtype,
            gpu=gpu,
        )

    def cost(self, *, gpu: Gpu) -> Cost:
        sizes = self.block_sizes(gpu=gpu)
        tokens = sum(self.lengths)
        tiled = sum(cdiv(length, sizes.block_kv) for length in self.lengths) * sizes.block_kv
        loaded = self.kv_heads * sum(self.loaded_bytes(n, sizes.block_kv) for n in self.lengths)
        vectors = len(self.lengths) * self.q_heads
        rows = max(MIN_ROWS, power_of_two(self.q_heads // self.kv_heads))
        return Cost(
            flops=4.0 * tokens * self.q_heads * self.head_dim,
            num_bytes=tokens * self.kv_heads * self.kv_bytes
            + vectors * (2 * self.vector_bytes + 4),
            scheduled_flops=4.0 * tiled * self.kv_heads * rows * self.columns,
            # Every split reads the queries and leaves its output and lse in float32.
            scheduled_bytes=loaded
            + vectors * sizes.num_splits * (self.vector_bytes + 4.0 * (self.head_dim + 1)),
        )


CASES: dict[str, DecodeCase] = {
    "one token": DecodeCase(lengths=(1,), slots=40, q_heads=4, kv_heads=2, head_dim=64),
    "empty rows": DecodeCase(lengths=(0, 5, 0), slots=97, q_heads=4, kv_heads=2, head_dim=64),
    "group of 7, odd length": DecodeCase(
        lengths=(97, 96), slots=97, q_heads=14, kv_heads=2, head_dim=64
    ),
    "group of 1, head_dim 80": DecodeCase(
        lengths=(97, 3), slots=128, q_heads=3, kv_heads=3, head_dim=80
    ),
    "ring of 384, just filled": DecodeCase(lengths=(384, 383), slots=384, q_heads=8, kv_heads=2),
    "ragged rows": DecodeCase(lengths=(1, 1025, 3000, 512), slots=3001, q_heads=8, kv_heads=2),
    "float16": DecodeCase(lengths=(1025,), slots=1100, q_heads=8, kv_heads=2, dtype="float16"),
    "float32": DecodeCase(lengths=(1025,), slots=1100, q_heads=8, kv_heads=2, dtype="float32"),
    "head_dim 96": DecodeCase(lengths=(300,), slots=333, q_heads=4, kv_heads=1, head_dim=96),
    "head_dim 256": DecodeCase(lengths=(300,), slots=333, q_heads=8, kv_heads=1, head_dim=256),
    "llama-3-8b, 4 retrieval heads at 517K": DecodeCase(
        lengths=(517_000,), slots=517_120, q_heads=16, kv_heads=4, compile_only=True
    ),
    "llama-3-8b, all heads at 517K": DecodeCase(
        lengths=(517_000,), slots=517_120, q_heads=32, kv_heads=8, compile_only=True
    ),
    "llama-3-8b, 4 streaming heads": DecodeCase(
        lengths=(384,), slots=384, q_heads=16, kv_heads=4, compile_only=True
    ),
    "llama-2-7b, 8 retrieval heads at 134K": DecodeCase(
        lengths=(134_000,), slots=134_144, q_heads=8, kv_heads=8, compile_only=True
    ),
    "llama-2-7b, all heads at 134K": DecodeCase(
        lengths=(134_000,), slots=134_144, q_heads=32, kv_heads=32, compile_only=True
    ),
}

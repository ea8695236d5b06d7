"""Named cases of full attention."""

import dataclasses

from kernels.case import Case, Cost
from kernels.full.api import full_attention
from kernels.gpu import Gpu
from kernels.prefill.cases import PrefillCase
from kernels.prefill.config import heuristic
from kernels.tiles import BlockSizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullCase(Case):
    """`batch` whole sequences of `length` tokens."""

    length: int
    batch: int = 1

    def shapes(self):
        kv = self.array(self.batch, self.length, self.kv_heads, self.head_dim)
        return self.array(self.batch, self.length, self.q_heads, self.head_dim), kv, kv

    def integers(self):
        return []

    def run(self, *arguments, implementation, block_sizes=None):
        out = full_attention(
            *arguments,
            softmax_scale=self.softmax_scale,
            implementation=implementation,
            block_sizes=block_sizes,
        )
        return (out,)

    def block_sizes(self, *, gpu: Gpu) -> BlockSizes:
        return heuristic(length=self.length, head_dim=self.head_dim, dtype=self.dtype, gpu=gpu)

    def cost(self, *, gpu: Gpu) -> Cost:
        cost = self.as_prefill().cost(gpu=gpu)
        lse_bytes = 4.0 * self.batch * self.length * self.q_heads
        # The kernel writes an lse that nobody asked for: scheduled, but not needed.
        return dataclasses.replace(cost, num_bytes=cost.num_bytes - lse_bytes)

    def as_prefill(self) -> PrefillCase:
        """Return the same work as a prefill from position 0, whose kernel does it."""
        return PrefillCase(
            offsets=(0,) * self.batch,
            length=self.length,
            slots=self.length,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            compile_only=self.compile_only,
        )


CASES: dict[str, FullCase] = {
    "one token": FullCase(length=1, q_heads=4, kv_heads=2, head_dim=64),
    "three tokens": FullCase(length=3, batch=2, q_heads=4, kv_heads=2, head_dim=64),
    "group of 7, odd length": FullCase(length=97, batch=2, q_heads=14, kv_heads=2, head_dim=64),
    "group of 1, head_dim 80": FullCase(length=129, q_heads=3, kv_heads=3, head_dim=80),
    "more than one block": FullCase(length=259, q_heads=8, kv_heads=2),
    "float16": FullCase(length=130, q_heads=4, kv_heads=1, dtype="float16"),
    "float32": FullCase(length=131, q_heads=4, kv_heads=1, dtype="float32"),
    "head_dim 96": FullCase(length=70, q_heads=4, kv_heads=1, head_dim=96),
    "head_dim 256": FullCase(length=70, q_heads=8, kv_heads=1, head_dim=256),
    "llama-3-8b, teacher at 32K": FullCase(
        length=32_000, q_heads=32, kv_heads=8, compile_only=True
    ),
    "llama-2-7b, teacher at 32K": FullCase(
        length=32_000, q_heads=32, kv_heads=32, compile_only=True
    ),
}

"""Named cases of full attention, and of its gradients."""

import dataclasses

import jax

from kernels.case import Case, Cost
from kernels.full.api import full_attention
from kernels.full.config import heuristic
from kernels.gpu import Gpu
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import schedule_of, with_gradient
from kernels.streaming.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullCase(Case):
    """`batch` whole sequences of `length` tokens."""

    length: int
    batch: int = 1
    gradient: bool = False  # run returns the gradients of q, k and v instead

    def shapes(self):
        q = self.array(self.batch, self.length, self.q_heads, self.head_dim)
        kv = self.array(self.batch, self.length, self.kv_heads, self.head_dim)
        return (q, kv, kv, q) if self.gradient else (q, kv, kv)

    def integers(self):
        return []

    def run(self, q, k, v, *d_out, implementation, block_sizes=None):
        def attend(q, k, v):
            return full_attention(
                q,
                k,
                v,
                softmax_scale=self.softmax_scale,
                implementation=implementation,
                config=block_sizes,
            )

        if not self.gradient:
            return (attend(q, k, v),)
        _, pull_back = jax.vjp(attend, q, k, v)
        return pull_back(*d_out)

    def block_sizes(self, *, gpu: Gpu) -> Config:
        return heuristic(length=self.length, head_dim=self.head_dim, dtype=self.dtype, gpu=gpu)

    def cost(self, *, gpu: Gpu) -> Cost:
        cost = self.as_prefill().cost(gpu=gpu)
        if not self.gradient:
            lse_bytes = 4.0 * self.batch * self.length * self.q_heads
            # The kernel writes an lse that nobody asked for: scheduled, but not needed.
            return dataclasses.replace(cost, num_bytes=cost.num_bytes - lse_bytes)
        schedule = schedule_of(self, length=self.length, sink=0, recent=self.length)
        return with_gradient(cost, schedule, self.block_sizes(gpu=gpu).backward, batch=self.batch)

    def as_prefill(self) -> PrefillCase:
        """Return the same work, forward, as a prefill from position 0, whose kernel does it."""
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
    "gradient, three tokens": FullCase(length=3, q_heads=4, kv_heads=2, head_dim=64, gradient=True),
    "gradient, odd length, group of 7": FullCase(
        length=97, batch=2, q_heads=7, kv_heads=1, head_dim=80, gradient=True
    ),
    "gradient, more than one block": FullCase(length=259, q_heads=4, kv_heads=2, gradient=True),
    "gradient, float32": FullCase(
        length=131, q_heads=2, kv_heads=2, head_dim=64, dtype="float32", gradient=True
    ),
    "gradient, head_dim 256": FullCase(
        length=70, q_heads=2, kv_heads=1, head_dim=256, gradient=True
    ),
    "llama-3-8b, gradient at 32K": FullCase(
        length=32_000, q_heads=32, kv_heads=8, gradient=True, compile_only=True
    ),
}

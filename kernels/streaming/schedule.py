"""What the streaming kernels load, store and multiply, counted by walking their loops on paper.

tests/kernels/test_cost.py holds it against the kernels themselves, run by the interpreter.
"""

import dataclasses
from collections.abc import Iterator

from kernels.streaming.backward import MAX_SINK_SPLITS
from kernels.tiles import BlockSizes, cdiv, width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Work of the programs of a kernel."""

    flops: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(flops=self.flops + other.flops, num_bytes=self.num_bytes + other.num_bytes)

    def __mul__(self, times: int) -> "Work":
        return Work(flops=self.flops * times, num_bytes=self.num_bytes * times)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """One row of a batch."""

    length: int
    sink: int
    recent: int
    q_heads: int
    kv_heads: int
    head_dim: int
    itemsize: int

    def forward(self, sizes: BlockSizes, *, past: int | None) -> Work:
        """Count the forward kernel behind `past` cached tokens; None: there are no recents."""
        sinks, recents = (min(self.sink, self.length), 0) if past is None else (
            self.sink, self.recent
        )  # fmt: skip
        tiles, tokens = 0, 0
        for first in range(0, self.length, sizes.block_q):
            window = first - (self.recent - 1)
            walks = [(max(window, 0), min(first + sizes.block_q, self.length))]
            if sinks:
                walks.append((0, min((past or 0) + first + sizes.block_q, sinks)))
            if window < 0:
                walks.append((max(window + recents, 0), recents))
            for start, end in walks:
                begin = start // sizes.block_kv
                tiles += cdiv(end, sizes.block_kv) - begin
                tokens += end - begin * sizes.block_kv
        per_head = Work(
            flops=2 * self._tile(sizes) * tiles,
            num_bytes=2 * self.vector_bytes * (tokens + self.length) + 4 * self.length,  # lse
        )
        return per_head * self.q_heads

    def backward(self, sizes: BlockSizes) -> Work:
        """Count the three kernels of the backward pass."""
        return self._d_q(sizes) * self.q_heads + self._d_kv(sizes) * self.kv_heads

    @property
    def vector_bytes(self) -> int:
        """Bytes of one query or key."""
        return self.head_dim * self.itemsize

    def _tile(self, sizes: BlockSizes) -> int:
        """Operations of one product of a tile of queries and one of keys."""
        return 2 * sizes.block_q * sizes.block_kv * width(self.head_dim)

    def _d_q(self, sizes: BlockSizes) -> Work:
        """Count the programs of one query head."""
        tiles, tokens = 0, 0
        sink = min(self.sink, self.length)
        for first in range(0, self.length, sizes.block_q):
            end = min(first + sizes.block_q, self.length)
            for start, stop in ((0, min(end, sink)), (max(first - (self.recent - 1), 0), end)):
                begin, stop = start // sizes.block_kv, cdiv(stop, sizes.block_kv)
                tiles += stop - begin
                tokens += min(stop * sizes.block_kv, self.length) - begin * sizes.block_kv
        return Work(
            flops=3 * self._tile(sizes) * tiles,
            # Queries, gradients of the output and of the queries; lse and delta.
            num_bytes=2 * self.vector_bytes * tokens + (3 * self.vector_bytes + 8) * self.length,
        )

    def _d_kv(self, sizes: BlockSizes) -> Work:
        """Count the programs of one KV head, for the window and for the sinks."""
        work = Work()
        sink = min(self.sink, self.length)
        for keys, first, end, is_sink in self._walks(sizes, sink):
            stored = min(sizes.block_kv, (sink if is_sink else self.length) - keys)
            loaded = min(sizes.block_kv, self.length - keys)
            rows = max(0, min(end * sizes.block_q, self.length) - first * sizes.block_q)
            group = self.q_heads // self.kv_heads
            work += Work(
                flops=4 * self._tile(sizes) * max(0, end - first) * group,
                num_bytes=2 * self.vector_bytes * (loaded + rows * group)
                + 8 * rows * group
                + 2 * self.head_dim * stored * (4 if is_sink else self.itemsize),
            )
        return work

    def _walks(self, sizes: BlockSizes, sink: int) -> Iterator[tuple[int, int, int, bool]]:
        """Yield first key, first and last query block, and whether it is a program for sinks."""
        blocks = cdiv(self.length, sizes.block_q)
        for keys in range(0, self.length, sizes.block_kv):
            end = cdiv(min(keys + sizes.block_kv + self.recent - 1, self.length), sizes.block_q)
            only_sinks = keys + sizes.block_kv <= sink
            yield keys, keys // sizes.block_q, 0 if only_sinks else end, False
        splits = max(1, min(MAX_SINK_SPLITS, blocks // 2))
        per_split = cdiv(blocks, splits)
        for keys in range(0, sink, sizes.block_kv):
            for split in range(splits):
                yield keys, split * per_split, min((split + 1) * per_split, blocks), True

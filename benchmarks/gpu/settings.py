"""Sizes and cases of the GPU report, and of its miniature for a CPU."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax

from benchmarks.gpu.models import LLAMA_2_7B, LLAMA_3_8B, Published
from benchmarks.serving import shapes
from duo_jax.serve import PrefillMode
from kernels.all_cases import CASES, Cases
from kernels.cached_case import LAYOUTS
from kernels.case import Case
from kernels.decode.cases import DecodeCase
from kernels.dispatch import Implementation
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import StreamingCase

# The same heads and tokens, full and streaming: what the streaming kernel saves.
FULL_32K = "llama-3-8b, all heads, first 32K"
STREAMING_32K = "llama-3-8b, all heads streaming, first 32K"
# The same heads and tokens, in bfloat16 and packed.
DECODE_500K = "llama-3-8b, 4 retrieval heads at 500K"


def packed_name(bits: int) -> str:
    """Return the name of the packed case that has the heads and tokens of DECODE_500K."""
    return f"int{bits}, {DECODE_500K}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of everything that is measured."""

    smoke: bool
    checks: Cases  # by op
    check_implementation: Implementation
    timed: Cases
    implementation: Implementation  # of what is timed
    mosaic: Implementation  # of what is checked and timed beside it, where that can run
    models: tuple[Published, ...]
    alone: bool = False  # neither Mosaic's kernels nor those of other libraries are timed
    dtype: str = "bfloat16"
    mode: PrefillMode = "exact"
    matmul_size: int = 8192
    copy_bytes: int = 2**32
    seconds_per_row: float = 0.25
    seconds_per_candidate: float = 0.15
    decode_steps: int = 8  # tokens per round
    decode_rounds: int = 5
    threads: int = 8  # that compile
    flops_per_second: float = 2.5e14  # of prefill, until one was measured
    bytes_per_second: float = 1.2e12  # of decoding

    @property
    def slots(self) -> int:
        """Slots that decoding at one context fills."""
        return 2 + self.decode_steps * self.decode_rounds

    def of(self, ops: Sequence[str] | None, words: Sequence[str] | None) -> "Settings":
        """Return the same with some ops' kernels, timed for cases named by one of some words."""
        checks, timed = (
            {op: cases for op, cases in some.items() if ops is None or op in ops}
            for some in (self.checks, self.timed)
        )
        timed = {
            op: {
                name: case
                for name, case in cases.items()
                if words is None or any(word in f"{op}: {name}" for word in words)
            }
            for op, cases in timed.items()
        }
        return dataclasses.replace(self, checks=checks, timed=timed)

    def timed_cases(self) -> list[tuple[str, tuple[str, Case]]]:
        """Return ("op: name", (op, case)) of what is timed; ops take turns, as time may end."""
        by_op = [
            [(f"{op}: {name}", (op, case)) for name, case in cases.items()]
            for op, cases in self.timed.items()
        ]
        turns = itertools.zip_longest(*by_op)
        return [item for turn in turns for item in turn if item is not None]


def real() -> Settings:
    """Return what runs on a GPU."""
    timed = {
        op: {name: case for name, case in cases.items() if case.compile_only}
        for op, cases in CASES.items()
    }
    timed["streaming"] = {
        STREAMING_32K: StreamingCase(length=32_000, q_heads=32, kv_heads=8)
    } | timed["streaming"]
    timed["decode"] = {
        DECODE_500K: DecodeCase(lengths=(500_000,), slots=500_032, q_heads=16, kv_heads=4)
    } | timed["decode"]
    return Settings(
        smoke=False,
        checks=CASES,
        check_implementation="triton",
        timed=timed,
        implementation="triton",
        mosaic="mosaic",
        models=(LLAMA_2_7B, LLAMA_3_8B),
    )


def smoke() -> Settings:
    """Return what runs to the end on a CPU, in a minute; its numbers mean nothing."""
    tiny = {"q_heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": "float32"}
    of_mosaic = tiny | {"head_dim": 64, "dtype": "bfloat16"}
    model = dataclasses.replace(
        shapes.model_config("gqa", layers=1, embed=64, q_heads=4), vocab_size=64, head_dim=16,
        num_kv_heads=2,
    )  # fmt: skip
    decode = DecodeCase(lengths=(33,), slots=64, **tiny)
    packed = {
        packed_name(bits): DecodeCase(bits=bits, lengths=(33,), slots=64, **tiny)
        for bits in LAYOUTS
    }
    return Settings(
        smoke=True,
        checks={
            "decode": {"odd length": decode},
            "decode_packed": {packed_name(4): packed[packed_name(4)]},
            "streaming": {
                "odd length": StreamingCase(length=19, sink_size=2, recent_size=8, **of_mosaic)
            },
        },
        check_implementation="interpret",
        timed={
            "decode": {DECODE_500K: decode},
            "decode_packed": packed,
            "prefill": {FULL_32K: PrefillCase(starts=(0,), length=32, slots=32, **of_mosaic)},
            "streaming": {
                STREAMING_32K: StreamingCase(length=32, sink_size=2, recent_size=8, **tiny)
            },
        },
        implementation="xla",
        mosaic="xla",
        models=(
            Published(
                name="tiny",
                architecture=model,
                retrieval_counts=(1,),
                sink=2,
                recent=6,
                contexts=(64, 32),
                prompt=32,
                chunk=16,
                decode_speedup=1.0,
                prefill_speedup=1.0,
                memory_saving=1.0,
                decode_goal=1.0,
                prefill_goal=1.0,
            ),
        ),
        dtype="float32",
        matmul_size=64,
        copy_bytes=2**12,
        seconds_per_row=0.01,
        seconds_per_candidate=0.01,
        decode_steps=2,
        decode_rounds=2,
        threads=2,
        flops_per_second=1e9,
    )


def has_gpu() -> bool:
    """Whether programs run on a GPU."""
    return jax.default_backend() == "gpu"

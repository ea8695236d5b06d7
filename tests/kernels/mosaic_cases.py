"""Cases of the Mosaic kernels, and what their tests share."""

import contextlib
import dataclasses
import functools

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels import compat
from kernels.all_cases import AWKWARD, named, served_by_mosaic
from kernels.case import AttentionCase, Case
from kernels.decode.cases import DecodeCase
from kernels.prefill.cases import PrefillCase
from kernels.tiles import AttentionTiles

needs_mosaic = pytest.mark.skipif(
    compat.no_mosaic() is not None, reason=f"Mosaic {compat.no_mosaic()}"
)
HEADS = {"q_heads": 4, "kv_heads": 2, "head_dim": 64}
H200, A100 = "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
ONE_HEAD = {"q_heads": 1, "kv_heads": 1, "head_dim": 64}
FEW = ONE_HEAD | {"q_heads": 3}
WIDE = HEADS | {"head_dim": 128}
MORE = {
    "decode, pages of 64": DecodeCase(lengths=(130, 0, 64), slots=192, page_size=64, **HEADS),
    "decode, pages of 128": DecodeCase(lengths=(255,), slots=256, page_size=128, **HEADS),
    "prefill, pages of 64": PrefillCase(
        starts=(100, 3), length=20, slots=128, page_size=64, **HEADS
    ),
    "decode, int8": DecodeCase(lengths=(130, 0), slots=192, bits=8, **HEADS),
    "decode, int8, head_dim 128": DecodeCase(lengths=(130,), slots=192, bits=8, **WIDE),
    "prefill, int4, pages of 64": PrefillCase(
        starts=(100,), length=20, slots=128, bits=4, page_size=64, **WIDE
    ),
    "prefill, int8": PrefillCase(starts=(30, 0), length=70, slots=128, bits=8, **HEADS),
    "decode, int2": DecodeCase(lengths=(130, 0, 64), slots=192, bits=2, **WIDE),
    "decode, int2, pages of 64": DecodeCase(
        lengths=(100,), slots=128, bits=2, page_size=64, **WIDE | {"dtype": "float16"}
    ),
    "prefill, int2": PrefillCase(starts=(30,), length=70, slots=128, bits=2, **WIDE),
    "decode, int4": DecodeCase(lengths=(130, 0), slots=192, bits=4, **WIDE),
    "decode, int4, pages of 64": DecodeCase(
        lengths=(100,), slots=128, bits=4, page_size=64, **WIDE | {"dtype": "float16"}
    ),
    "decode, int4, head_dim 64": DecodeCase(lengths=(70,), slots=128, bits=4, **FEW),
    "decode, int4, head_dim 64, pages of 64": DecodeCase(
        lengths=(100,), slots=128, bits=4, page_size=64, **FEW
    ),
    "decode, int2, head_dim 64": DecodeCase(lengths=(70,), slots=128, bits=2, **FEW),
    "decode, int2, head_dim 64, pages of 64": DecodeCase(
        lengths=(100,), slots=128, bits=2, page_size=64, **FEW
    ),
    "decode, int8, head_dim 96": DecodeCase(
        lengths=(130,), slots=192, bits=8, **HEADS | {"head_dim": 96}
    ),
}


CASES = MORE | {
    name: case for name, case in named().items() if served_by_mosaic(case) and not case.compile_only
}
# Lengths where blocks and windows begin and end, which the other kernels take in float32.
CASES |= {
    f"{name}, bfloat16": dataclasses.replace(case, dtype="bfloat16", head_dim=64)
    for name, case in named(AWKWARD).items()
    if isinstance(case, AttentionCase) and not case.gradient and case.head_dim == 16
}
# Interpretation takes seconds for each.
DEFAULT = {
    "decode: one token",
    "full: three tokens",
    "prefill: three tokens, ragged",
    "streaming: one token before the sinks' end",
    "decode, int8, head_dim 128",
    "decode, int4, pages of 64",
    "decode, int2, pages of 64",
    "decode, int4, head_dim 64",
    "decode, int2, head_dim 64, pages of 64",
    "prefill, int4, pages of 64",
}


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in DEFAULT else [pytest.mark.slow]


def two_stages(block_q: int) -> AttentionTiles:
    return AttentionTiles(block_q=block_q, block_kv=64, num_warps=12, num_stages=2)


def described(gpu: str):
    """Trace for a GPU that is only described."""
    device = AbstractDevice(device_kind=gpu, num_cores=108, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def refusal(implementation: str, gpu: str | None = None, case: Case | None = None) -> str:
    """Return why an implementation cannot run a case, for a described GPU or for the CPU."""
    case = case or CASES["decode: one token"]
    run = functools.partial(case.run, implementation=implementation)
    with (
        described(gpu) if gpu else contextlib.nullcontext(),
        pytest.raises(NotImplementedError) as raised,
    ):
        jax.eval_shape(run, *case.shapes())
    return str(raised.value)

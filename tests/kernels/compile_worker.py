"""Cases that kernels must compile for, and what the compiler has against one of them."""

import itertools

from kernels import aot
from kernels.all_cases import named
from kernels.case import Case
from kernels.decode.cases import DecodeCase
from kernels.full.cases import FullCase
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import StreamingCase
from kernels.tiles import AttentionTiles, ForwardBackwardTiles

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")
STRICT = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


def grid() -> dict[str, Case]:
    """Return every op at every head_dim and dtype; no length is a multiple of a tile."""
    cases = {}
    for head_dim, dtype in itertools.product(HEAD_DIMS, DTYPES):
        sizes = {"q_heads": 8, "kv_heads": 2, "head_dim": head_dim, "dtype": dtype}
        cases |= {
            f"{op}: {head_dim} x {dtype}": case
            for op, case in {
                "decode": DecodeCase(lengths=(2999,), slots=3001, **sizes),
                "prefill": PrefillCase(starts=(1001,), length=517, slots=3001, **sizes),
                "chunk": StreamingCase(length=517, lengths=(1001,), **sizes),
                "gradient": StreamingCase(length=517, gradient=True, **sizes),
                "full gradient": FullCase(length=517, gradient=True, **sizes),
            }.items()
        }
    return cases


def hopeless() -> dict[str, tuple[Case, ForwardBackwardTiles]]:
    """Return cases with tile sizes that no GPU can hold: the check must report them."""
    case = StreamingCase(length=517, lengths=(1001,), q_heads=8, kv_heads=2, dtype="float32")

    def both(**sizes: int) -> ForwardBackwardTiles:
        tiles = AttentionTiles(**sizes)
        return ForwardBackwardTiles(forward=tiles, backward=tiles)

    return {
        "spills": (case, both(block_q=64, block_kv=64, num_warps=4, num_stages=1)),
        "shared memory": (case, both(block_q=128, block_kv=128, num_warps=8, num_stages=3)),
    }


def all_cases() -> dict[str, tuple[Case, ForwardBackwardTiles | None]]:
    """Return all cases and the tile sizes to compile them with; None: the op's own."""
    return {name: (case, None) for name, case in {**named(), **grid()}.items()} | hopeless()


def complaint(target: aot.Target, name: str) -> str | None:
    """Return what the compiler has against a case; None if it is compiled without spilling."""
    case, tiles = all_cases()[name]

    def run(*arguments):
        return case.run(*arguments, implementation="triton", tiles=tiles)

    try:
        aot.compile_for(target, run, *case.shapes(), options=STRICT)
    except Exception as error:  # whatever it is, it is this case's result
        return " ".join(str(error).split())[-500:]
    return None

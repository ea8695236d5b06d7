"""An engine's programs compiled for one A100: pools are updated in place, nothing is gathered."""

import pytest

from benchmarks.serving import shapes
from duo_jax.cache import cache_bytes
from duo_jax.heads.split import DuoConfig
from duo_jax.serve import ahead_of_time
from duo_jax.serve.ahead_of_time import PagedSizes
from kernels.aot_process import Compiler

# Of Llama-3-8B's shapes.
MODEL = shapes.model_config("gqa", layers=1)
CONFIG = DuoConfig(architecture=MODEL, retrieval_counts=(4,), sink_size=64, recent_size=256)
SIZES = PagedSizes(rows=48, num_pages=16_384, page_size=64, max_len=131_072)  # 1,048,576 tokens
ROWS = 16


def needs(kv: str, chunk: int) -> tuple[int, int]:
    """Return the bytes of the workspace, and of what is updated in place."""
    if chunk:
        program = ahead_of_time.engine_prefill(CONFIG, SIZES, target="a100", chunk=chunk, kv=kv)
    else:
        program = ahead_of_time.engine_decode(CONFIG, SIZES, target="a100", batch_size=ROWS, kv=kv)
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes, memory.alias_size_in_bytes


# Tokens of a chunk, none in a decode step; and the most bytes of a workspace: rings of 16 rows and
# logits, or activations of 1,024 tokens. The pool has 0.2 to 1.9 GB.
STEPS = [(0, 0.05e9), (1024, 0.11e9)]


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["model", "int8", "int4", "int2"])
@pytest.mark.parametrize("step", STEPS)
def test_steps_update_the_pool_in_place(compiler: Compiler, kv, step):
    chunk, most = step
    size = cache_bytes(
        CONFIG,
        batch_size=SIZES.rows,
        max_len=SIZES.max_len,
        dtype="bfloat16",
        kv=kv,
        num_pages=SIZES.num_pages,
        page_size=SIZES.page_size,
    )
    temp, updated = compiler.call(needs, kv, chunk)
    assert updated == pytest.approx(size, rel=1e-3)
    assert temp < most

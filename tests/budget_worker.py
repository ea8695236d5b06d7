"""Compile one whole program for an A100 and print what it needs of the GPU's memory, as JSON.

A process of its own, so that a compiler that aborts fails one test. `python -m tests.budget_worker
NAME`.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp

from benchmarks import shapes
from duo_jax import compiled, llama
from duo_jax.split import DuoConfig
from kernels import aot
from train.distillation import Batch
from train.optimisation import StepConfig, init_state, train_step

LLAMA_3 = shapes.model_config("gqa", layers=32)
LLAMA_2 = shapes.model_config("mha", layers=32)
# Retrieval heads per layer of the published patterns, ../shared/SPEC.md section 6.
LLAMA_3_1048K = "1 1 3 2 2 4 2 4 6 4 5 3 2 6 5 5 5 6 3 5 6 3 3 6 4 4 3 4 6 5 8 2"
LLAMA_2_32K = "2 10 2 5 3 4 9 8 9 5 8 10 4 6 12 9 12 10 9 6 11 8 14 5 12 8 12 3 6 6 12 16"


def duo(model, heads: str) -> DuoConfig:
    counts = tuple(map(int, heads.split()))
    return DuoConfig(model=model, retrieval_heads=counts, sink_size=128, recent_size=256)


def identification(length: int):
    """Compile one step of gate training on Llama-3-8B."""
    step = StepConfig(
        num_steps=2000,
        learning_rate=0.02,
        reg_weight=0.05,
        target_sparsity=None,
        sink_size=128,
        recent_size=256,
        mixing="teacher",
        tail_size=1024,
        implementation="triton",
    )
    state = jax.eval_shape(lambda: init_state(LLAMA_3, step))
    params = jax.eval_shape(
        lambda: llama.init_params(LLAMA_3, jax.random.key(0), dtype=jnp.bfloat16)
    )
    row = jnp.zeros(1, jnp.int32)
    batch = jax.eval_shape(
        lambda: Batch(tokens=jnp.zeros((1, length), jnp.int32), tail_start=row, total_length=row)
    )
    function = functools.partial(train_step, model=LLAMA_3, config=step)
    return aot.compile_for("a100", function, state, params, batch)


DUO_3, DUO_2 = duo(LLAMA_3, LLAMA_3_1048K), duo(LLAMA_2, LLAMA_2_32K)
on_a100 = {"target": "a100"}
PROGRAMS = {
    "llama-3 decode at 1M": lambda: compiled.decode_step(DUO_3, max_len=1_000_001, **on_a100),
    "llama-3 chunk of 32,000 at 900K": lambda: compiled.prefill_chunk(
        DUO_3, max_len=932_000, chunk=32_000, **on_a100
    ),
    "llama-3 decode at 1M without DuoAttention": lambda: compiled.decode_step(
        DUO_3.all_retrieval(), max_len=1_000_001, **on_a100
    ),
    "llama-2 decode at 200K": lambda: compiled.decode_step(DUO_2, max_len=200_001, **on_a100),
    "llama-2 chunk of 10,000 at 190K": lambda: compiled.prefill_chunk(
        DUO_2, max_len=200_000, chunk=10_000, **on_a100
    ),
    "identification at 32,000": lambda: identification(32_000),
    "identification at 96,000": lambda: identification(96_000),
}


if __name__ == "__main__":
    program = PROGRAMS[sys.argv[1]]()
    memory = program.memory_analysis()
    print(
        json.dumps(
            {
                "peak": memory.peak_memory_in_bytes,
                "arguments": memory.argument_size_in_bytes,
                "temp": memory.temp_size_in_bytes,
                "updated_in_place": memory.alias_size_in_bytes,
            }
        )
    )

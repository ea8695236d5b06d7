"""A plan compared with the compiler: the programs of a row, compiled for a GPU that is not there.

Every row gets a process of its own, with jax on the CPU: some compilers abort, and a process that
has a GPU cannot describe another one.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from duo_jax.errors import InputError
from duo_jax.heads.split import DuoConfig
from duo_jax.model.config import ModelConfig, RopeConfig
from duo_jax.plan.estimate import Estimate
from duo_jax.serve import ahead_of_time as compiled
from kernels import aot
from kernels.aot import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Peaks that the compiler lays out, in bytes."""

    decode: int
    prefill: int

    @property
    def peak(self) -> int:
        """What serving takes."""
        return max(self.decode, self.prefill)


def compile_row(estimate: Estimate, context: int, *, target: Target) -> Compiled:
    """Compile the decode step and the reading of a chunk at a context; takes minutes.

    Raises:
      InputError: nothing can be compiled for a GPU here.
      RuntimeError: a program does not compile; with the end of what the compiler printed.
    """
    workload, setting = estimate.workload, estimate.setting
    order = {
        "config": dataclasses.asdict(estimate.config),
        "target": target,
        "max_len": context,
        "chunk": min(workload.chunk, context),
        "batch_size": workload.batch_size,
        "dtype": workload.dtype,
        "weights": setting.weights,
        "kv": setting.kv,
    }
    done = subprocess.run(
        [sys.executable, "-m", "duo_jax.plan.verify", json.dumps(order)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{setting} do not compile:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "unavailable" in answer:
        raise InputError(f"nothing can be compiled for a GPU here: {answer['unavailable']}")
    return Compiled(**answer)


def _answer(order: dict[str, Any]) -> dict[str, Any]:
    reason = aot.unavailable()
    if reason is not None:
        return {"unavailable": reason}
    model = order["config"].pop("architecture")
    model = ModelConfig(**{**model, "rope": RopeConfig(**model["rope"])})
    counts = tuple(order["config"].pop("retrieval_counts"))
    config = DuoConfig(architecture=model, retrieval_counts=counts, **order.pop("config"))
    chunk = order.pop("chunk")
    programs = {
        "decode": compiled.decode_step(config, **order),
        "prefill": compiled.prefill_chunk(config, chunk=chunk, **order),
    }
    return {
        name: program.memory_analysis().peak_memory_in_bytes for name, program in programs.items()
    }


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.argv[1]))))

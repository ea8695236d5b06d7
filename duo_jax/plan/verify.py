"""Check of a plan with the compiler: compiles a row's programs for a GPU that need not be here."""

import dataclasses
from typing import Any

from duo_jax.errors import InputError
from duo_jax.heads.split import DuoConfig
from duo_jax.model.config import ModelConfig, RopeConfig
from duo_jax.plan.estimate import Estimate
from duo_jax.serve import ahead_of_time
from kernels import aot
from kernels.aot import Target
from kernels.aot_process import Compiler, CompilerError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Peaks that the compiler lays out, in bytes."""

    decode: int
    prefill: int

    @property
    def peak(self) -> int:
        """Peak of serving, the larger one."""
        return max(self.decode, self.prefill)


def compile_row(estimate: Estimate, context: int, *, target: Target) -> Compiled:
    """Compile the decode step and the reading of a chunk at a context; takes minutes.

    Raises:
      InputError: nothing can be compiled for a GPU here.
      RuntimeError: a program does not compile; with the end of what the compiler printed.
    """
    workload, setting = estimate.workload, estimate.setting
    sizes = {
        "target": target,
        "max_len": context,
        "batch_size": workload.batch_size,
        "dtype": workload.dtype,
        "weights": setting.weights,
        "kv": setting.kv,
        "devices": workload.devices,
    }
    config = dataclasses.asdict(estimate.config)
    with Compiler() as compiler:
        try:
            reason = compiler.call(aot.unavailable)
            if reason is not None:
                raise InputError(f"nothing can be compiled for a GPU here: {reason}")
            peaks = compiler.call(_peaks, config, sizes, min(workload.chunk, context))
        except CompilerError as error:
            raise RuntimeError(f"{setting} do not compile: {error}") from None
    return Compiled(**peaks)


def _peaks(config: dict[str, Any], sizes: dict[str, Any], chunk: int) -> dict[str, int]:
    """Return the fields of Compiled; the config is a DuoConfig as JSON holds it."""
    architecture = config["architecture"]
    rope = RopeConfig(**architecture["rope"])
    duo = DuoConfig(
        **config
        | {
            "architecture": ModelConfig(**architecture | {"rope": rope}),
            "retrieval_counts": tuple(config["retrieval_counts"]),
        }
    )
    programs = {
        "decode": ahead_of_time.decode_step(duo, **sizes),
        "prefill": ahead_of_time.prefill_chunk(duo, chunk=chunk, **sizes),
    }
    peaks = {}
    for name, program in programs.items():
        memory = program.memory_analysis()
        assert memory is not None
        peaks[name] = memory.peak_memory_in_bytes
    return peaks

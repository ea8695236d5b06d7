"""Compile whole programs for eight A100-80G, and tell what memory each of them needs.

Nothing is executed and no GPU is needed, as in benchmarks.budgets. Llama-3-70B has no published
pattern: its layers get the retrieval heads of Llama-3-8B-Instruct-Gradient-4194k at 50%, in turn.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import budgets, command
from benchmarks.budgets import DUO_4194K, Serving, identification, needs
from duo_jax import files
from duo_jax.errors import InputError
from duo_jax.heads.split import DuoConfig
from duo_jax.reports import machine
from kernels import aot
from kernels.aot_process import Compiler

DEVICES = 8
# In XLA's text: what an operation returns, and its name; an array, as bf16[8,10,128].
_KINDS = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
_MESSAGE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
LLAMA_3_70B = dataclasses.replace(
    DUO_4194K.architecture,
    num_layers=80,
    embed_size=8192,
    mlp_size=28_672,
    num_q_heads=64,
    num_kv_heads=8,
)
DUO_70B = DuoConfig(
    architecture=LLAMA_3_70B,
    retrieval_counts=tuple(DUO_4194K.retrieval_counts[layer % 32] for layer in range(80)),
)


def _serving(config: DuoConfig, context: int, chunk: int | None = None, **formats: Any) -> Serving:
    return Serving(config=config, context=context, chunk=chunk, devices=DEVICES, **formats)


_SMALL: dict[str, Any] = {"weights": "int8", "kv": "int4"}
_CHUNK = 32_000  # the last tokens of a context
SERVING: dict[str, Serving] = {
    "Llama-3-70B, 50%: decode at 3,000,000": _serving(DUO_70B, 3_000_000),
    "Llama-3-70B, 50%: chunk of 32,000, the last of 3,000,000": _serving(
        DUO_70B, 3_000_000 - _CHUNK, _CHUNK
    ),
    "Llama-3-70B, full caches: decode at 3,000,000": _serving(DUO_70B.all_retrieval(), 3_000_000),
    "Llama-3-70B, 50%, int8 weights, int4 KV: decode at 13,000,000": _serving(
        DUO_70B, 13_000_000, **_SMALL
    ),
    "Llama-3-70B, 50%, int8 weights, int4 KV: chunk of 32,000, the last of 13,000,000": _serving(
        DUO_70B, 13_000_000 - _CHUNK, _CHUNK, **_SMALL
    ),
    "Llama-3-8B, 50%: decode at 9,500,000": _serving(DUO_4194K, 9_500_000),
    "Llama-3-8B, 50%: chunk of 32,000, the last of 9,500,000": _serving(
        DUO_4194K, 9_500_000 - _CHUNK, _CHUNK
    ),
}


def _identification(length: int) -> Callable[[], jax.stages.Compiled]:
    return lambda: identification(length, model=LLAMA_3_70B, devices=DEVICES)


PROGRAMS: dict[str, Callable[[], jax.stages.Compiled]] = {
    **SERVING,
    "Llama-3-70B: identification step at 32,000": _identification(32_000),
    "Llama-3-70B: identification step at 128,000": _identification(128_000),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshBudgetFlags:
    """Which programs, and where the results go."""

    program: str | None = None
    """Only this one; its numbers are printed as JSON, and nothing is written."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Folder of mesh_budgets.json and mesh_budgets.md."""

    def __post_init__(self) -> None:
        if self.program is not None and self.program not in PROGRAMS:
            raise InputError(f"program {self.program!r} is not one of {', '.join(PROGRAMS)}")
        reason = aot.unavailable()
        if reason is not None:
            raise InputError(f"nothing can be compiled for a GPU here: {reason}")


def main(flags: MeshBudgetFlags) -> None:
    """Compile one program and print its bytes, or all and write them."""
    with Compiler() as compiler:
        if flags.program is not None:
            print(json.dumps(compiler.call(compile_program, flags.program)))
            return
        programs = {}
        for name in PROGRAMS:
            programs[name] = compiler.call(compile_program, name)
            print(f"{name}: {programs[name]['peak'] / 1e9:.2f} GB", flush=True)
    result = {
        "command": machine.command("benchmarks.mesh_budgets"),
        "jax": jax.__version__,
        "target": f"{DEVICES} x A100-SXM4-80GB",
        "dtype": "bfloat16",
        "programs": programs,
    }
    files.make_folder(flags.out)
    files.write_text(flags.out / "mesh_budgets.json", json.dumps(result, indent=1) + "\n")
    files.write_text(flags.out / "mesh_budgets.md", to_markdown(result) + "\n")


def compile_program(name: str) -> dict[str, int]:
    """Return what `needs` says of a program, of each GPU."""
    return needs(PROGRAMS[name]())


def few_layers(name: str, first: int, end: int) -> dict[str, Any]:
    """Return what some layers of a program need, and all messages between GPUs.

    A message is [its operation, the bytes of its largest array].
    """
    program = SERVING[name].of_layers(slice(first, end))()
    return {"needs": needs(program), "messages": messages(program)}


def messages(program: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Return the messages of a compiled program."""
    found = map(_MESSAGE.search, (program.as_text() or "").splitlines())
    return [(m[2], max(map(_array_bytes, _ARRAY.finditer(m[1])))) for m in found if m]


def _array_bytes(match: re.Match[str]) -> int:
    bits = int(re.sub(r"\D", "", match[1]) or 8)  # a predicate, pred, takes a byte
    return math.prod(int(size) for size in match[2].split(",") if size) * bits // 8


def to_markdown(result: dict[str, Any]) -> str:
    """Return the table, in gigabytes (1e9) of each GPU."""
    return budgets.to_markdown(result, programs="program on 8 GPUs")


if __name__ == "__main__":
    aot.on_cpu()
    command.run(main, MeshBudgetFlags)

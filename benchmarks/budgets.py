"""Compile whole programs of published models for one A100-80G, and tell what memory they need.

Nothing is executed and no GPU is needed (kernels.aot); the compiler lays out all buffers, so the
peak is that of the program.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks import command
from benchmarks.gpu.models import LLAMA_2_7B, LLAMA_3_8B
from duo_jax import files
from duo_jax.cache import KVFormat
from duo_jax.errors import InputError
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh import weights
from duo_jax.mesh.devices import abstract_mesh
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.reports import machine, markdown
from duo_jax.serve import ahead_of_time as compiled
from kernels import aot
from kernels.aot_process import Compiler
from train import attribution, masks, optimisation
from train.distillation import Batch, Mixing
from train.loss import StepConfig

BUDGET = 83e9  # of the 85.1e9 bytes of an A100-80G


def identification(
    length: int,
    mixing: Mixing = "teacher",
    method: Literal["optimise", "masks", "attribute"] = "optimise",
    *,
    model: ModelConfig = LLAMA_3_8B.architecture,
    devices: int = 1,
) -> jax.stages.Compiled:
    """Compile one step of a method on Llama-3-8B, or on another model and several GPUs."""
    step = StepConfig(
        num_steps=2000,
        learning_rate=0.02,
        reg_weight=0.05,
        target_sparsity=0.75 if method == "masks" else None,
        sink_size=128,
        recent_size=256,
        mixing=mixing,
        tail_size=1024,
        objective="distillation" if method == "optimise" else "cross_entropy",
        implementation="triton",
    )
    starts = {
        "optimise": lambda: optimisation.init_state(model, step),
        "masks": lambda: masks.init_state(model, step, seed=0),
        "attribute": lambda: attribution.init_state(model),
    }
    modules = {"optimise": optimisation, "masks": masks, "attribute": attribution}
    state = jax.eval_shape(starts[method])
    params = jax.eval_shape(lambda: llama.init_params(model, jax.random.key(0), dtype=jnp.bfloat16))
    row = jnp.zeros(1, jnp.int32)
    batch = jax.eval_shape(
        lambda: Batch(
            tokens=jnp.zeros((1, length), jnp.int32),
            tail_start=row,
            total_length=row,
            answers=None if method == "optimise" else jnp.zeros((1, length), bool),
        )
    )
    function = functools.partial(modules[method].train_step, architecture=model, step=step)
    mesh = compiled.described_mesh("a100", devices)
    if mesh is not None:
        params = compiled.placed(params, weights.shardings(mesh, params, stacked=True))
    return aot.compile_for("a100", function, state, params, batch, devices=mesh)


DUO_3, DUO_2 = (published.variants[0].config for published in (LLAMA_3_8B, LLAMA_2_7B))
# Retrieval heads that the published pattern of Llama-3-8B-Instruct-Gradient-4194k keeps at 50%.
DUO_4194K = dataclasses.replace(
    DUO_3,
    retrieval_counts=(
        *(2, 1, 3, 0, 2, 5, 2, 4, 5, 3, 4, 4, 1, 6, 5, 5),
        *(5, 6, 3, 3, 6, 4, 5, 5, 5, 5, 5, 6, 5, 5, 8, 0),
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """A decode step at a context, or the reading of a chunk that begins there."""

    config: DuoConfig
    context: int
    chunk: int | None = None  # None: a decode step
    weights: WeightFormat = "model"
    kv: KVFormat = "model"
    devices: int = 1

    @property
    def max_len(self) -> int:
        return self.context + (self.chunk or 1)

    def __call__(self) -> jax.stages.Compiled:
        """Compile it for an A100."""
        options = {"max_len": self.max_len, "weights": self.weights, "kv": self.kv}
        options |= {"devices": self.devices}
        if self.chunk is None:
            return compiled.decode_step(self.config, target="a100", **options)
        return compiled.prefill_chunk(self.config, target="a100", chunk=self.chunk, **options)

    def of_layers(self, layers: slice) -> "Serving":
        """Return the same program of fewer layers: it compiles quickly, with as much workspace."""
        heads = self.config.retrieval_counts[layers]
        model = dataclasses.replace(self.config.architecture, num_layers=len(heads))
        config = dataclasses.replace(self.config, architecture=model, retrieval_counts=heads)
        return dataclasses.replace(self, config=config)

    def held(self) -> int:
        """Return the bytes of weights and caches on each GPU, from their shapes alone."""
        shapes = compiled.held_shapes(
            self.config,
            mesh=None if self.devices == 1 else abstract_mesh(self.devices),
            weights=self.weights,
            batch_size=1,
            max_len=self.max_len,
            kv=self.kv,
        )
        return compiled.tree_bytes(shapes)


_QUANTISED = {
    "int4 KV": {"config": DUO_4194K, "weights": "int8", "kv": "int4"},
    "int2 KV": {"config": DUO_4194K, "weights": "int8", "kv": "int2"},
}
_LONG = (("int4 KV", 3_300_000), ("int4 KV", 4_000_000), ("int2 KV", 6_500_000))
SERVING: dict[str, Serving] = {
    "Llama-3-8B, 50%: decode at 1,000,000": Serving(config=DUO_3, context=1_000_000),
    "Llama-3-8B, 50%: chunk of 32,000 at 900,000": Serving(
        config=DUO_3, context=900_000, chunk=32_000
    ),
    "Llama-3-8B, full caches: decode at 1,000,000": Serving(
        config=DUO_3.all_retrieval(), context=1_000_000
    ),
    "Llama-2-7B, 25%: decode at 200,000": Serving(config=DUO_2, context=200_000),
    "Llama-2-7B, 25%: chunk of 10,000 at 190,000": Serving(
        config=DUO_2, context=190_000, chunk=10_000
    ),
    **{
        f"Llama-3-8B, 50%, int8 weights, {name}: {what} at {context:,}": Serving(
            context=context, chunk=chunk, **_QUANTISED[name]
        )
        for name, context in _LONG
        for what, chunk in (("decode", None), ("chunk of 32,000", 32_000))
    },
    **{
        f"Llama-3-8B, 50%, int8 weights, {name}: chunk of 32,000 at {context:,}": Serving(
            context=context, chunk=32_000, **_QUANTISED[name]
        )
        for name, context in (("int4 KV", 4_400_000), ("int2 KV", 7_150_000))
    },
}
PROGRAMS: dict[str, Callable[[], jax.stages.Compiled]] = {
    **SERVING,
    "Llama-3-8B: identification step at 32,000": lambda: identification(32_000),
    "Llama-3-8B: identification step at 96,000": lambda: identification(96_000),
    "Llama-3-8B: identification step, self mixing, at 96,000": lambda: identification(
        96_000, "self"
    ),
    "Llama-3-8B: masks step at 32,000": lambda: identification(32_000, "self", "masks"),
    "Llama-3-8B: attribution step at 32,000": lambda: identification(32_000, "self", "attribute"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetFlags:
    """Which programs, and where the results go."""

    program: str | None = None
    """Only this one; its numbers are printed as JSON, and nothing is written."""
    layers: tuple[int, int] | None = None
    """With --program: only these layers of the model, first and end."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Folder of budgets.json and budgets.md."""

    def __post_init__(self) -> None:
        if self.program is not None and self.program not in PROGRAMS:
            raise InputError(f"program {self.program!r} is not one of {', '.join(PROGRAMS)}")
        if self.layers is not None and self.program not in SERVING:
            raise InputError("--layers goes with the --program of a decode step or chunk")
        reason = aot.unavailable()
        if reason is not None:
            raise InputError(f"nothing can be compiled for a GPU here: {reason}")


def main(flags: BudgetFlags) -> None:
    """Compile one program and print its bytes, or all and write them."""
    with Compiler() as compiler:
        if flags.program is not None:
            print(json.dumps(compiler.call(compile_program, flags.program, flags.layers)))
            return
        programs = {}
        for name in PROGRAMS:
            programs[name] = compiler.call(compile_program, name)
            print(f"{name}: {programs[name]['peak'] / 1e9:.2f} GB", flush=True)
    result = {
        "command": machine.command("benchmarks.budgets"),
        "jax": jax.__version__,
        "target": "A100-SXM4-80GB",
        "dtype": "bfloat16",
        "sink": DUO_3.sink_size,
        "recent": DUO_3.recent_size,
        "programs": programs,
    }
    files.make_folder(flags.out)
    files.write_text(flags.out / "budgets.json", json.dumps(result, indent=1) + "\n")
    files.write_text(flags.out / "budgets.md", to_markdown(result) + "\n")


def compile_program(name: str, layers: Sequence[int] | None = None) -> dict[str, int]:
    """Return what `needs` says of a program; of `layers` (first and end) only, if given."""
    if layers is None:
        return needs(PROGRAMS[name]())
    return needs(SERVING[name].of_layers(slice(*layers))())


def needs(program: jax.stages.Compiled) -> dict[str, int]:
    """Return the bytes of a compiled program on its GPU."""
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "updated_in_place": memory.alias_size_in_bytes,
    }


def to_markdown(result: dict[str, Any], *, programs: str = "program") -> str:
    """Return the table, in gigabytes (1e9) of a GPU; `programs` is the title of their names."""
    return markdown.table(
        (programs, "weights, caches, inputs", "workspace", "peak GB", "of 83"),
        [
            (
                name,
                *(f"{program[key] / 1e9:.2f}" for key in ("arguments", "temp", "peak")),
                "fits" if program["peak"] <= BUDGET else "does not fit",
            )
            for name, program in result["programs"].items()
        ],
    )


if __name__ == "__main__":
    aot.on_cpu()
    command.run(main, BudgetFlags)

"""One case compiled for one GPU and described; a job of kernels.aot_process."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from benchmarks.compile import ptx
from kernels import aot
from kernels.all_cases import CASES
from kernels.case import Case
from kernels.gpu import A100, H100, H200, Gpu

GPUS: dict[aot.Target, Gpu] = {"a100": A100, "h100": H100, "h200": H200}
NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
_OURS = "duo_"


def compile_case(op: str, name: str, target: aot.Target, dump: str) -> dict[str, Any]:
    """Compile one case and describe its kernels, as JSON holds them.

    A case that spills is compiled again with spilling allowed, so that its row has numbers too.

    Args:
      op: of kernels.all_cases.
      name: of the case.
      target: the GPU.
      dump: the folder into which XLA_FLAGS of this process dump.
    """
    case, folder = CASES[op][name], pathlib.Path(dump)
    try:
        lowered = lower(case, target)
    except (NotImplementedError, ValueError) as error:
        return {"error": _first_line(error), "text": None, "kernels": []}
    error = _compile(lowered, NO_SPILLS, folder)
    if error is not None and "spill" in error:
        _compile(lowered, {}, folder)
    kernels = list(_kernels(case.tiles(gpu=GPUS[target]), folder))
    return {"error": error, "text": aot.fingerprint(target, lowered), "kernels": kernels}


def lower(case: Case, target: aot.Target, *, tiles: Any = None) -> jax.stages.Lowered:
    """Lower a case for one GPU; by default with the tile sizes that the op chooses."""

    def run(*arguments):
        return case.run(*arguments, implementation="triton", tiles=tiles)

    return aot.lower_for(target, run, *case.shapes())


def block_sizes(sizes: Any, kernel: str) -> dict[str, int]:
    """Return the tile sizes of one kernel of a case, by its name."""
    if hasattr(sizes, "forward"):
        sizes = sizes.backward if kernel.endswith(("_dq", "_dkv", "_dsink")) else sizes.forward
    return dataclasses.asdict(sizes)


def _compile(
    lowered: jax.stages.Lowered, options: Mapping[str, Any], folder: pathlib.Path
) -> str | None:
    """Compile, and return in one line why it failed; None if it did not."""
    for left in folder.iterdir():  # folders hold what ran on the CPU
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    try:
        aot.compile_lowered(lowered, options=options)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _kernels(sizes: Any, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield a description of each of our kernels in XLA's dump."""
    launches: dict[str, ptx.Launch] = {}
    for file in sorted(folder.glob("*.thunk_sequence.txt")):
        launches |= ptx.launches(file.read_text(encoding="utf-8"))
    found = {}
    for file in sorted(folder.glob("*.ptx")):
        text = file.read_text(encoding="utf-8")
        name = ptx.entry(text)
        if name is not None and name.startswith(_OURS):
            found[name] = ptx.describe(str(file), text) | _launch(launches.get(name))
    for name, kernel in sorted(found.items()):
        yield kernel | {"block_sizes": block_sizes(sizes, name)}


def _launch(launch: ptx.Launch | None) -> dict[str, Any]:
    """Return how XLA starts a kernel; None where it did not say."""
    if launch is None:
        return dict.fromkeys(field.name for field in dataclasses.fields(ptx.Launch))
    return dataclasses.asdict(launch)

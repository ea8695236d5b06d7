"""One case compiled for one GPU and described; a job of kernels.aot_process."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.compile import occupancy, ptx
from kernels import aot
from kernels.all_cases import CASES
from kernels.case import Case

_NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
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
    error = _compile(case, target, _NO_SPILLS, folder)
    if error is not None and "spill" in error:
        _compile(case, target, {}, folder)
    limit = occupancy.limits(target)
    return {"error": error, "kernels": list(_kernels(case, limit, folder))}


def _compile(case: Case, target: aot.Target, options: dict, folder: pathlib.Path) -> str | None:
    """Compile, and return in one line why it failed; None if it did not."""
    shapes = case.shapes()
    for left in folder.iterdir():  # folders hold what ran on the CPU
        shutil.rmtree(left) if left.is_dir() else left.unlink()

    def run(*arguments):
        return case.run(*arguments, implementation="triton")

    try:
        aot.compile_for(target, run, *shapes, options=options)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return None


def _kernels(case: Case, limit: occupancy.Limits, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield a description of each of our kernels in XLA's dump."""
    launches: dict[str, ptx.Launch] = {}
    for file in sorted(folder.glob("*.thunk_sequence.txt")):
        launches |= ptx.launches(file.read_text(encoding="utf-8"))
    sizes = case.tiles(gpu=limit.gpu)
    found = {}
    for file in sorted(folder.glob("*.ptx")):
        text = file.read_text(encoding="utf-8")
        if (ptx.entry(text) or "").startswith(_OURS):
            kernel = ptx.describe(str(file), text)
            found[kernel["name"]] = kernel | _launch(kernel, launches.get(kernel["name"]), limit)
    for name, kernel in sorted(found.items()):
        yield kernel | {"block_sizes": block_sizes(sizes, name)}


def _launch(
    kernel: dict[str, Any], launch: ptx.Launch | None, limit: occupancy.Limits
) -> dict[str, Any]:
    """Return what is known once the launch is; None where XLA did not say."""
    if launch is None:
        return dict.fromkeys(("grid", "threads", "dynamic_shared", "programs_at_once", "occupancy"))
    at_once = occupancy.programs_at_once(
        limit,
        registers=kernel["registers"],
        shared_memory=kernel["static_shared"] + launch.dynamic_shared,
        threads=launch.threads,
    )
    return {
        **dataclasses.asdict(launch),
        "programs_at_once": at_once,
        "occupancy": at_once * launch.threads / limit.threads,
    }


def block_sizes(sizes: Any, kernel: str) -> dict[str, int]:
    """Return the tile sizes of one kernel of a case, by its name."""
    if hasattr(sizes, "forward"):
        sizes = sizes.backward if kernel.endswith(("_dq", "_dkv", "_dsink")) else sizes.forward
    return dataclasses.asdict(sizes)

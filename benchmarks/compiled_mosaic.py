"""Every Mosaic kernel as the compilers leave it, for an H200 and an H100, without either.

    python -m benchmarks.compiled_mosaic

The cases of kernels.all_cases that Mosaic kernels serve are compiled for an H200, and described by
their PTX, by ptxas and by Mosaic's list of resources; one case of each op for an H100 too, whose
PTX is compared. Nothing is executed. It needs what kernels.aot needs, and jax 0.11 or newer.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import command
from benchmarks.compile import mosaic
from benchmarks.compiled import ptxas_version
from duo_jax import files
from duo_jax.errors import InputError
from duo_jax.reports import machine
from kernels import aot, compat
from kernels.aot_process import Compiler, CompilerError

RESULT = pathlib.Path("benchmarks/results/compiled_mosaic.json")
DOCUMENT = pathlib.Path("docs/kernels_mosaic.md")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledMosaicFlags:
    """Flags of the benchmark."""

    result: pathlib.Path = RESULT
    """Where to write the JSON."""
    document: pathlib.Path = DOCUMENT
    """Where to write the tables."""


def main(flags: CompiledMosaicFlags) -> None:
    """Compile, and write both files."""
    aot.on_cpu()
    reason = aot.unavailable() or compat.no_mosaic()
    if reason is not None:
        raise InputError(reason)
    began, rows, compared = time.monotonic(), [], mosaic.compared()
    with tempfile.TemporaryDirectory() as folder, Compiler() as h200, Compiler() as h100:
        for op, case in tqdm(mosaic.cases(), unit="case", disable=None):
            row = _compiled(h200, op, case, folder, "h200")
            text, same = row.pop("ptx"), None
            if compared[op] == case:
                same = text == _compiled(h100, op, case, folder, "h100")["ptx"] is not None
            rows.append({"op": op, "case": case, **row, "same_for_h100": same})
    result = {
        "command": machine.command("benchmarks.compiled_mosaic"),
        "jax": jax.__version__,
        "ptxas": ptxas_version(),
        "run_minutes": round((time.monotonic() - began) / 60, 1),
        "rows": rows,
    }
    for path in (flags.result, flags.document):
        files.make_folder(path.parent)
    files.write_text(flags.result, json.dumps(result, indent=1) + "\n")
    files.write_text(flags.document, mosaic.to_markdown(result))


def _compiled(compiler: Compiler, *job: str) -> dict[str, Any]:
    try:
        return compiler.call(mosaic.compile_case, *job)
    except CompilerError as error:
        return {"error": str(error).split("\n")[0], "kernels": [], "ptx": None}


if __name__ == "__main__":
    command.run(main, CompiledMosaicFlags)

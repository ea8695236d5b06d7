"""Every kernel as the compilers leave it, for an A100 and an H200, without either.

    python -m benchmarks.compiled

Every case of kernels.all_cases is compiled for both GPUs, with spilled registers made an error, and
described by its PTX, by ptxas and by XLA's list of launches; the roofline of the cases of real size
is counted. Nothing is executed. It needs what kernels.aot needs: jax's CUDA plugin, ptxas, nvlink.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import command
from benchmarks.compile import report, roofline, worker
from duo_jax import files
from duo_jax.errors import InputError
from duo_jax.reports import machine
from kernels import aot, compat
from kernels.all_cases import CASES
from kernels.aot_process import Compiler, CompilerError

RESULT = pathlib.Path("benchmarks/results/compiled.json")
DOCUMENT = pathlib.Path("docs/kernels.md")
TARGETS: tuple[aot.Target, ...] = ("a100", "h200")  # an H100 takes the same code as an H200

Job = tuple[str, str]  # op and case


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledFlags:
    """Flags of the benchmark."""

    targets: tuple[aot.Target, ...] = TARGETS
    """GPUs to compile for."""
    ops: tuple[str, ...] = tuple(CASES)
    """Operations to compile."""
    result: pathlib.Path = RESULT
    """Where to write the JSON."""
    document: pathlib.Path = DOCUMENT
    """Where to write the tables."""

    def __post_init__(self) -> None:
        unknown = [op for op in self.ops if op not in CASES]
        if unknown or not self.ops or not self.targets:
            raise InputError(f"ops are {', '.join(CASES)}, not {', '.join(unknown) or 'none'}")


def main(flags: CompiledFlags) -> None:
    """Compile, count, and write both files."""
    aot.on_cpu()
    reason = aot.unavailable()
    if reason is not None:
        raise InputError(reason)
    began = time.monotonic()
    jobs = [(op, case) for op in flags.ops for case in CASES[op]]
    rows = []
    with tqdm(total=len(jobs) * len(flags.targets), unit="case", disable=None) as bar:
        for target in flags.targets:
            bar.set_description(target)
            for row in compile_all(jobs, target):
                rows.append(row)
                bar.update()
    result = {
        "command": machine.command("benchmarks.compiled"),
        "jax": jax.__version__,
        "ptxas": ptxas_version(),
        "run_minutes": round((time.monotonic() - began) / 60, 1),
        "rows": rows,
        "roofline": roofline.rows(flags.ops),
    }
    for path in (flags.result, flags.document):
        files.make_folder(path.parent)
    files.write_text(flags.result, json.dumps(result, indent=1) + "\n")
    files.write_text(flags.document, report.to_markdown(result))
    print(report.summary(result))


def compile_all(jobs: Sequence[Job], target: aot.Target) -> Iterator[dict[str, Any]]:
    """Yield a row per case; a case that ends the compiler's process gets a row that says so."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Compiler(xla_flags=compat.ptx_dump_flags(folder)) as compiler,
    ):
        for op, case in jobs:
            try:
                row = compiler.call(worker.compile_case, op, case, target, folder)
            except CompilerError as error:
                end, *_, last = str(error).split("\n")
                said = end if end == last else f"{end} ... {last}"
                row = {"error": said, "text": None, "kernels": []}
            real_size = CASES[op][case].compile_only
            yield {"op": op, "case": case, "target": target, **row, "real_size": real_size}


def ptxas_version() -> str:
    """Return the version of the ptxas that compiles."""
    said = subprocess.run([aot.ptxas(), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V([\d.]+)", said.stdout)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    command.run(main, CompiledFlags)

"""Everything worth knowing about the kernels on one GPU, in one call of under ten minutes.

    python -m benchmarks.gpu_report --out results

Stages, each with a share of the time and a JSON file of its own: what the device reaches at best;
every kernel checked against XLA; the kernels timed beside other libraries; decoding and prefill of
whole models of random weights, full and split; other tile sizes. What the time did not reach is
listed, a failure is recorded, and neither stops the rest. Needs what duo_jax needs but tyro;
PyTorch and matplotlib are used where they are. --smoke runs everything in miniature, on a CPU too.
"""

import argparse
import os
import time

_BEGAN = time.monotonic()
# Before jax looks: caches of half a million tokens need more than the usual three quarters.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import dataclasses  # noqa: E402
import functools  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402

from benchmarks.gpu import (  # noqa: E402
    block_sweep,
    ceilings,
    check_stage,
    kernel_table,
    memory,
    plots,
    serving_stage,
    summary,
    tables,
    targets,
)
from benchmarks.gpu.settings import Settings, has_gpu, real, smoke  # noqa: E402
from benchmarks.gpu.tables import Stage, Table  # noqa: E402
from duo_jax import files  # noqa: E402
from duo_jax.reports import machine  # noqa: E402
from kernels.all_cases import CASES  # noqa: E402

STAGES = ("ceilings", "checks", "mosaic_checks", "serving", "kernels", "sweep")
_GRACE = 15.0  # seconds after the last deadline, for a measurement under way


def main(arguments: argparse.Namespace, *, began: float) -> int:
    """Run the stages; return the exit code. The time counts from `began`."""
    settings = (smoke() if arguments.smoke else real()).of(arguments.ops, arguments.cases)
    settings = dataclasses.replace(settings, alone=arguments.alone)
    timing = {"kernels", "sweep"} & set(arguments.stages)
    if arguments.cases is not None and timing and not settings.timed_cases():
        words = " or ".join(arguments.cases)
        print(f"error: --cases: no case that is timed has {words} in its name", file=sys.stderr)
        return 2
    if not settings.smoke and not has_gpu():
        print(f"error: jax runs on {jax.default_backend()} here, and this report needs a GPU; "
              "try --smoke", file=sys.stderr)  # fmt: skip
        return 2
    folder = arguments.out
    files.make_folder(folder)
    header, found = _header(settings), {}
    title = f"{'SMOKE RUN, numbers mean nothing: ' if settings.smoke else ''}{header['hardware']}"

    finish = functools.partial(_finish, found, folder, header, title)
    seconds = 60 * arguments.minutes
    stop = threading.Timer(seconds + _GRACE - (time.monotonic() - began), _stop, [finish])
    stop.daemon = True
    stop.start()
    tables.run(
        _stages(settings, found, arguments),
        found,
        folder=folder,
        header=header,
        began=began,
        seconds=seconds,
    )
    stop.cancel()
    try:
        print(plots.draw(found, folder, title=f"{title}, jax {jax.__version__}"))
    except Exception as error:  # the numbers are there
        print(f"no pictures: {tables.reason(error)}")
    finish()
    return 0


def _stages(settings: Settings, found: dict[str, Table], arguments) -> list[Stage]:
    stages = [
        Stage(name="ceilings", share=0.03, run=functools.partial(ceilings.run, settings)),
        Stage(
            name="checks",
            share=0.12,
            run=functools.partial(check_stage.run, settings, arguments.part),
        ),
        Stage(
            name="mosaic_checks",
            share=0.12,
            run=functools.partial(check_stage.run_mosaic, settings, arguments.part),
        ),
        # Before the kernels' rivals, which take half the memory: a peak counts only if it is new.
        Stage(name="serving", share=0.5, run=functools.partial(serving_stage.run, settings)),
        Stage(name="kernels", share=0.15, run=functools.partial(kernel_table.run, settings, found)),
        Stage(name="sweep", share=0.08, run=functools.partial(block_sweep.run, settings)),
    ]
    assert tuple(stage.name for stage in stages) == STAGES

    return [
        dataclasses.replace(stage, name=arguments.part.named(stage.name))
        for stage in stages
        if stage.name in arguments.stages
    ]


def _header(settings: Settings) -> dict[str, Any]:
    return {
        "smoke": settings.smoke,
        "command": machine.command("benchmarks.gpu_report"),
        **machine.environment(),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "backend": jax.default_backend(),
        "driver": _driver(),
        "memory_limit_bytes": memory.limit(),
        "dtype": settings.dtype,
        "prefill_mode": settings.mode,
        "models": [
            {
                "name": model.name,
                "sink": model.sink,
                "recent": model.recent,
                "chunk": model.chunk,
                "prompt": model.prompt,
                "contexts": model.contexts,
                "retrieval_heads": model.retrieval_counts,
            }
            for model in settings.models
        ],
    }


def _driver() -> str | None:
    """Return the GPU driver's version; reads it, changes nothing."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def _finish(found: dict[str, Table], folder: pathlib.Path, header: dict[str, Any], title: str):
    """Judge the targets, write them, and print the summary."""
    judged = targets.judge(found, hardware=header["hardware"])
    content = {**header, "targets": [target.to_json() for target in judged]}
    files.write_text(folder / "targets.json", json.dumps(content, indent=2) + "\n")
    print("\n".join(summary.lines(found, judged, title=title)), flush=True)


def _stop(finish) -> None:
    """End a run that is stuck in one measurement: the tables so far are on disk."""
    print("stopped: the time is over, and a measurement has not come back", flush=True)
    finish()
    os._exit(3)


def _parse(words: list[str] | None = None) -> argparse.Namespace:
    # Not tyro, as elsewhere: a machine with a GPU and nothing to install from may lack it.
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--out", type=pathlib.Path,
        help="folder for the tables (default: $OUT, else benchmarks/results/gpu; runs/gpu-smoke "
        "with --smoke)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="time for all stages (default: 9.5)"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device")
    parser.add_argument(
        "--stages", type=lambda text: text.split(","), default=list(STAGES),
        help=f"some of {','.join(STAGES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--ops", type=lambda text: text.split(","), default=None,
        help="some ops of both checks, kernels and sweep, as in decode,merge (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=None,
        help="of kernels and sweep, those with one of these words (between commas) in their name, "
        "as in decode:,32K at 288K (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--alone", action="store_true",
        help="time and tune the Triton kernels without Mosaic's and other libraries'",
    )  # fmt: skip
    parser.add_argument(
        "--part", type=_part, default=check_stage.Part(),
        help="K/N: part K of N of the checks; N processes do them all, side by side, each with its "
        "share of the memory by XLA_PYTHON_CLIENT_MEM_FRACTION",
    )  # fmt: skip
    arguments = parser.parse_args(words)
    if arguments.out is None:
        ours = "runs/gpu-smoke" if arguments.smoke else "benchmarks/results/gpu"
        arguments.out = pathlib.Path(os.environ.get("OUT") or ours)
    unknown = [name for name in arguments.ops or [] if name not in CASES]
    if unknown:
        parser.error(f"--ops: {unknown[0]!r} is not one of {','.join(CASES)}")
    unknown = [name for name in arguments.stages if name not in STAGES]
    if unknown:
        parser.error(f"--stages: {unknown[0]!r} is not one of {','.join(STAGES)}")
    if not 0 < arguments.minutes < 1e4:
        parser.error("--minutes must be more than 0")
    if arguments.part.parts > 1 and not set(arguments.stages) <= {"checks", "mosaic_checks"}:
        parser.error("--part is for the stages checks and mosaic_checks")
    return arguments


def _part(text: str) -> check_stage.Part:
    words = text.split("/")
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, as in 1/3")
    number, parts = map(int, words)
    if not 1 <= number <= parts:
        raise argparse.ArgumentTypeError(f"there is no part {number} of {parts}")
    return check_stage.Part(number=number, parts=parts)


if __name__ == "__main__":
    sys.exit(main(_parse(), began=_BEGAN))

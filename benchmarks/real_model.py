"""All results of a pretrained model: needles, passkeys, other methods, RULER, perplexity, formats.

    python -m benchmarks.real_model --model MODEL --pattern PATTERN

Each step is a command of `python -m duo_jax.evaluate`, in a process and a folder of its own; what
is finished is not run again, and a step that was stopped goes on where it was. At the end, or when
it is stopped, what there is is written: JSON, pictures, and a page that also says what is missing.
"""

import dataclasses
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Annotated

import tyro

from benchmarks import command
from benchmarks.real import page, results
from benchmarks.real.run import run_missing
from benchmarks.real.steps import Sizes, Step, all_steps, write_filler
from duo_jax.errors import InputError
from duo_jax.heads.pattern import load_pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealModelFlags:
    """Flags of the benchmark."""

    model: str
    """The model, as python -m duo_jax.evaluate takes it."""
    pattern: str
    """The folder of its pattern."""
    only: tuple[str, ...] = ()
    """Steps to run: those whose names begin with one of these. Default: all."""
    minutes: float | None = None
    """Start no step later than this. Default: all are run."""
    work: pathlib.Path = pathlib.Path("runs/real_model")
    """Folder of what is measured."""
    results: pathlib.Path = pathlib.Path("benchmarks/results/smollm2")
    """Folder of result files and pictures."""
    page: pathlib.Path = pathlib.Path("docs/results_smollm2.md")
    """The page to write."""
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sizes)


def main(flags: RealModelFlags) -> None:
    """Run what is missing, and write what there is.

    Raises:
      InputError: a step failed, after all others have been run.
    """
    pattern = load_pattern(flags.pattern)
    write_filler(flags.work)
    steps = all_steps(flags.sizes, flags.pattern, flags.work)
    folders = {step.name: step.folder(flags.work, flags.model, pattern) for step in steps}
    wanted = [step for step in steps if not flags.only or step.name.startswith(flags.only)]
    try:
        failed = run_missing(
            [(step, folders[step.name]) for step in wanted],
            model=flags.model,
            minutes=flags.minutes,
        )
    finally:  # what is finished is shown, also after Ctrl-C
        _write(flags, steps, folders)
    if failed:
        raise InputError(f"these steps failed: {', '.join(failed)}")


def _write(flags: RealModelFlags, steps: list[Step], folders: dict[str, pathlib.Path]) -> None:
    """Write JSON and pictures of all steps that are done, and the page."""
    places = {
        **{str(folder): "FOLDER" for folder in folders.values()},
        f"{flags.work}/": "",
        sysconfig.get_paths()["stdlib"]: "STDLIB",
        flags.pattern: "PATTERN",
        flags.model: "MODEL",
    }
    places = {place: word for place, word in places.items() if "/" in place}  # no model's name
    done = [(step, folders[step.name]) for step in steps]
    results.collect(
        flags.results,
        done,
        model=pathlib.PurePath(flags.model).stem,
        places=places,
        command=" ".join(_command(flags)),
    )
    page.write(flags.results, flags.page)


def _command(flags: RealModelFlags) -> Iterator[str]:
    """Yield the words that measure all of it: those that choose steps or folders are left out."""
    yield from ("python", "-m", "benchmarks.real_model")
    yield from ("--model", flags.model, "--pattern", flags.pattern)
    usual = Sizes()
    for field in dataclasses.fields(Sizes):
        value = getattr(flags.sizes, field.name)
        if value != getattr(usual, field.name):
            yield f"--{field.name.replace('_', '-')}"
            yield from map(str, value if isinstance(value, tuple) else (value,))


if __name__ == "__main__":
    command.run(main, RealModelFlags)

"""How well choices of retrieval heads serve: plain text, needles, passkeys and RULER, side by side.

    python -m benchmarks.head_tasks --model M --patterns learned=FOLDER profile=FOLDER

The steps of benchmarks.real_model for several patterns, through the caches that serve: what one of
the two has finished, the other does not run again. All choices answer the same texts, so that
differences are paired, text by text: from full caches, and from the first pattern.
"""

import dataclasses
import pathlib
from typing import Any

from benchmarks import command
from benchmarks.quality import head_tasks_report as report
from benchmarks.quality import named
from benchmarks.real.run import run_missing
from benchmarks.real.steps import Sizes, Step, all_steps, write_filler
from duo_jax import files
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, load_pattern
from duo_jax.reports import machine
from duo_jax.schema.check import check_fields
from duo_jax.schema.json_reader import read_json
from duo_jax.schema.kinds import Count, Few, Fraction

_PARTS = ("perplexity", "needle", "passkeys", "ruler")  # of benchmarks.real_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadTasksFlags:
    """Flags of the benchmark."""

    model: str
    """The model, as python -m duo_jax.evaluate takes it."""
    patterns: tuple[str, ...]
    """Patterns to compare, NAME=FOLDER each; others are compared with the first."""
    sparsities: tuple[Fraction, ...] = (0.75,)
    """Fractions of streaming heads."""
    lengths: tuple[Count, ...] = (1024, 2048, 4096)
    """Lengths of texts with needles and passkeys and of RULER's prompts, in tokens."""
    samples: tuple[Few, ...] = (8, 6, 4)
    """Texts with passkeys for each of the lengths."""
    ruler_limits: tuple[Few, ...] = (10, 8, 4)
    """Questions of RULER for each of the lengths."""
    ruler_tasks: tuple[str, ...] = ("niah_single_1",)
    """Tasks of RULER that need no download."""
    perplexity_length: Count = Sizes.perplexity_length
    """Tokens of the texts to predict."""
    work: pathlib.Path = pathlib.Path("runs/real_model")
    """Folder of what is measured; that of benchmarks.real_model may be the same."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/head_tasks.json")
    """Where to write the result; .md and .png stand beside it."""

    def __post_init__(self) -> None:
        check_fields(self)
        names = [name for name, _ in named.split(self.patterns)]
        if not names or len(set(names)) != len(names) or report.FULL in names:
            raise InputError(f"every pattern needs a name of its own, not {', '.join(names)}")

    def sizes(self) -> Sizes:
        """Return how much is measured."""
        return Sizes(
            lengths=self.lengths,
            samples=self.samples,
            sparsities=self.sparsities,
            ruler_tasks=self.ruler_tasks,
            ruler_limits=self.ruler_limits,
            perplexity_length=self.perplexity_length,
            perplexity_sparsities=self.sparsities,
        )


def main(flags: HeadTasksFlags) -> None:
    """Run what is missing, write and draw the results, print the tables.

    Raises:
      InputError: a step failed, after all others have been run.
    """
    places = dict(named.split(flags.patterns))
    patterns = {name: load_pattern(place) for name, place in places.items()}
    if len({(p.sink_size, p.recent_size) for p in patterns.values()}) > 1:
        raise InputError("the patterns have several sizes of sink and recent; name those of one")
    steps = {name: _steps(flags, places[name], patterns[name]) for name in places}
    files.make_folder(flags.out.parent)
    files.check_file(flags.out)
    write_filler(flags.work)
    failed = []
    for name, of_pattern in steps.items():
        print(f"== {name}: {places[name]}", flush=True)
        failed += run_missing(of_pattern, model=flags.model)
    if failed:
        raise InputError(f"these steps failed: {', '.join(failed)}")
    found = {
        name: {step: read_json(step.result(folder)) for step, folder in of_pattern}
        for name, of_pattern in steps.items()
    }
    result = _result(flags, found, next(iter(patterns.values())))
    report.write(result, flags.out)
    print(report.to_markdown(result))
    print(f"written: {flags.out.with_suffix('')}.json, .md, .png")


def _steps(flags: HeadTasksFlags, place: str, pattern: Pattern) -> list[tuple[Step, pathlib.Path]]:
    """Return the steps of a pattern, with their folders."""
    return [
        (step, step.folder(flags.work, flags.model, pattern))
        for step in all_steps(flags.sizes(), place, flags.work)
        if step.name.startswith(_PARTS)
    ]


def _result(
    flags: HeadTasksFlags, found: dict[str, dict[Step, Any]], pattern: Pattern
) -> dict[str, Any]:
    first = next(iter(next(iter(found.values())).values()))
    measured = [step for steps in found.values() for step in steps.values()]
    machines = [step.get("duo_jax", step) for step in measured]
    return {
        "command": machine.command("benchmarks.head_tasks"),
        "settings": machine.to_json(flags),
        "hardware": sorted({step["hardware"] for step in machines}),
        "jax": sorted({step["jax"] for step in machines}),
        "model": first["model"],
        "dtype": first["dtype"],
        "sink": pattern.sink_size,
        "recent": pattern.recent_size,
        "choices": list(found),
        "rows": list(report.rows(found)),
    }


if __name__ == "__main__":
    command.run(main, HeadTasksFlags)

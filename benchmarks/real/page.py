"""docs/results_smollm2.md: every table of a pretrained model's result files."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.real import results, ruler, tables
from duo_jax import files
from duo_jax.evaluate.compare import report as compare_report
from duo_jax.evaluate.frontier import report as frontier_report
from duo_jax.evaluate.frontier import search
from duo_jax.evaluate.perplexity import report as perplexity_report
from duo_jax.evaluate.results import describe
from duo_jax.reports import statistics
from duo_jax.schema.json_reader import read_json

_HEAD = """\
# Results on {model}

Written from the files in `{folder}`; do not edit it. A real pretrained model on a CPU, so there
are few texts: ± is two standard errors over texts, which is 0 where all texts agree and then says
less than it seems to. One command measures all of it, and goes on where it was stopped; it needs
`pip install '.[eval]'`. For another model name other folders (`--results`, `--work`, `--page`):

<!-- takes minutes -->
```bash
{command}
```
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Some result files, and how each is shown."""

    title: str
    text: str
    parts: Callable[[str], bool]  # whether a file of this name belongs to it
    table: Callable[[results.Found], str]


def _by_length(found: results.Found) -> str:
    task = next(iter(found.values()))["result"]["task"]
    return "\n\n".join(
        [
            tables.to_markdown(
                f"{task}: exact retrieval", tables.by_length(found, "exact"), statistics.percent
            ),
            tables.to_markdown(
                f"{task}: answer NLL, nats per token",
                tables.by_length(found, "nll"),
                statistics.nats,
            ),
        ]
    )


def _ruler(found: results.Found) -> str:
    return "\n\n".join(
        tables.to_markdown(task, ruler.scores(found, task), statistics.percent)
        for task in ruler.tasks(found)
    )


def _perplexity(found: results.Found) -> str:
    return perplexity_report.to_markdown(results.together(found))


def _frontier(found: results.Found) -> str:
    result = found["frontier"]["result"]
    return frontier_report.to_markdown(result, *search.stored(result))


_SECTIONS = (
    Section(
        title="Perplexity by position",
        text=(
            "Long modules of Python's standard library, which no pattern of ours was found on, "
            "read through the caches; columns are numbers of tokens before the predicted one."
        ),
        parts=lambda name: name == "perplexity",
        table=_perplexity,
    ),
    Section(
        title="Passkeys",
        text=(
            'Numbers of five digits in filler ("The grass is green. The sky is blue. ..."); the '
            "text is read before any question is asked. A passkey counts if greedy decoding would "
            "write all of it."
        ),
        parts=lambda name: name.startswith("passkeys"),
        table=_by_length,
    ),
    Section(
        title="One needle at every depth",
        text=(
            "A number of five digits, hidden once in filler; the question is part of the prompt, "
            "the model writes the answer."
        ),
        parts=lambda name: name == "needle",
        table=_by_length,
    ),
    Section(
        title="Beside other methods, at equal bytes of cache",
        text="As in [the demo model's comparison](results.md), in filler, with random heads once.",
        parts=lambda name: name == "compare",
        table=lambda found: compare_report.to_markdown(found["compare"]["result"]),
    ),
    Section(
        title="Split, format and eviction together",
        text=(
            "Every way to spend the bytes of a cache, as "
            "[evaluate](evaluate.md#split-format-and-eviction-together) explains; in filler, with "
            "questions after tokens were chosen (KVzip's score)."
        ),
        parts=lambda name: name == "frontier",
        table=_frontier,
    ),
    Section(
        title="RULER",
        text=(
            "Tasks of lm-evaluation-harness that need no download, by the length of the prompt. "
            "Every question has one answer, which is written or not."
        ),
        parts=lambda name: name == "ruler",
        table=_ruler,
    ),
    Section(
        title="Smaller weights and caches",
        text=(
            "Full caches, so that only the formats differ: perplexity on the texts above, and "
            "passkeys. The model has 64 channels a head, and never trained for any of them."
        ),
        parts=lambda name: name.startswith("formats"),
        table=lambda found: _perplexity(found) if "bounds" in _last(found) else _by_length(found),
    ),
)


def write(folder: pathlib.Path, page: pathlib.Path) -> None:
    """Write the page from the files in a folder.

    Raises:
      InputError: a result file is damaged.
    """
    about = read_json(folder / results.ABOUT)
    lines = [_HEAD.format(model=about["model"], folder=folder, command=about["command"])]
    names = list(about["parts"])
    for section in _SECTIONS:
        present = list(filter(section.parts, names))
        if not present:
            continue
        lines += [f"## {section.title}\n", f"{section.text}\n"]
        for name in present:
            found = read_json(folder / f"{name}.json")
            lines += [f"{section.table(found)}\n", f"{where(found)}\n"]
            if files.present(folder / f"{name}.png"):
                lines.append(f"![{section.title}](../{folder}/{name}.png)\n")
    if about["missing"]:
        lines += [
            "## Not measured yet\n",
            "Of the command's steps, named by part, length and percentage of streaming heads:\n",
            *(f"- {', '.join(names)}" for names in about["missing"].values()),
            "",
        ]
    files.write_text(page, "\n".join(lines))


def where(found: results.Found) -> str:
    """Say what a part was measured on and with."""
    result = _last(found)
    result = result | result.get("duo_jax", {})
    words = [result["hardware"], f"jax {result['jax']}", f"Python {result['python']}"]
    if "bounds" in result:
        words.append(perplexity_report.in_words(result))
    else:
        words.append(describe.in_words(result | {"weights": "model", "kv": "model"}))
    return f"{'; '.join(words)}. First of {len(found)} commands: `{_first(found)['command']}`."


def _first(found: Mapping[str, Any]) -> dict[str, Any]:
    return next(iter(found.values()))["result"]


def _last(found: Mapping[str, Any]) -> dict[str, Any]:
    *_, last = found.values()
    return last["result"]

"""Result of benchmarks.head_tasks: its rows, tables and picture."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from benchmarks.real import ruler, tables
from benchmarks.real.steps import FULL, Step
from duo_jax import files
from duo_jax.evaluate.perplexity import report as perplexity_report
from duo_jax.evaluate.results.result_json import to_json
from duo_jax.reports import figures, markdown, statistics

Result = dict[str, Any]
Scores = dict[tuple[str, str], Float[np.ndarray, " texts"]]  # by task and measure
Choice = tuple[str, str]  # a pattern's name ("" for full caches), and the setting
_PERPLEXITY = "perplexity"
_WORDS = {_PERPLEXITY: "plain text", "needle": "one needle"}
_WRITE = {"nll": statistics.nats, "exact": statistics.percent}
_NAMES = {"nll": "NLL", "exact": "exact"}


def rows(found: Mapping[str, Mapping[Step, Result]]) -> Iterator[Result]:
    """Yield a row for every choice, task and measure: the scores of all its texts.

    Texts of several lengths follow each other, the shortest first.

    Args:
      found: by pattern, its steps and what each has measured.
    """
    seen = set()
    for name, steps in found.items():
        for part in dict.fromkeys(step.part for step in steps):
            entries = {
                step.name: {"row": step.row, "result": result}
                for step, result in steps.items()
                if step.part == part
            }
            for setting, measure, task, texts in _scores(part, entries):
                heads = "" if setting == FULL else name
                if (heads, setting, task, measure) in seen:  # full caches, once more
                    continue
                seen.add((heads, setting, task, measure))
                yield {
                    "heads": heads,
                    "setting": setting,
                    "task": task,
                    "measure": measure,
                    "texts": texts.tolist(),
                }


def _scores(part: str, entries: tables.Found) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """Yield the setting, measure, task and scores of all texts of a part."""
    if part == _PERPLEXITY:
        for entry in entries.values():
            (texts,) = perplexity_report.by_text(entry["result"]).values()
            yield entry["row"], "nll", part, texts
    elif part == "ruler":
        for task in ruler.tasks(entries):
            for setting, texts in _joined(ruler.scores(entries, task)):
                yield setting, "exact", task, texts
    else:
        for measure in ("nll", "exact"):
            for setting, texts in _joined(tables.by_length(entries, measure)):
                yield setting, measure, part, texts


def _joined(texts: tables.Texts) -> Iterator[tuple[str, np.ndarray]]:
    for setting, lengths in texts.items():
        yield setting, np.concatenate(list(lengths.values()))


def write(result: Result, out: pathlib.Path) -> None:
    """Write JSON, the tables and the picture."""
    files.write_text(out, to_json(result))
    title = f"# Choices of heads, by task, on {result['model']}\n\n"
    files.write_text(out.with_suffix(".md"), f"{title}{to_markdown(result)}\n")
    files.write_bytes(out.with_suffix(".png"), png(result))


def to_markdown(result: Result) -> str:
    """Write the settings, the scores, and differences from full caches and from the first."""
    settings, first = result["settings"], result["choices"][0]
    lengths = ", ".join(f"{length:,}" for length in settings["lengths"])
    found = by_choice(result)
    parts = [
        f"{result['model']}, {result['dtype']}; sink {result['sink']}, recent {result['recent']}; "
        f"through the caches that serve. Plain text: long modules of Python's library, "
        f"{settings['perplexity_length']:,} tokens; needles and passkeys: numbers of five digits "
        f"in filler, RULER: its own texts, {lengths} tokens together. ±: two standard errors over "
        "texts (0 where all agree, which then says less than it seems to), of differences paired "
        f"by text. {'; '.join(result['hardware'])}, jax {', '.join(result['jax'])}.",
        _table(found, list(found)),
        f"Minus full caches, nats per token:\n\n{differences(found, ('', FULL))}",
    ]
    if len(result["choices"]) > 1:
        parts.append(f"Minus {first}, nats per token:\n\n{differences(found, (first, ''))}")
    return "\n\n".join(parts)


def by_choice(result: Result) -> dict[Choice, Scores]:
    """Return the scores of every choice: full caches, then by setting in the patterns' order."""
    found: dict[Choice, Scores] = {}
    for row in result["rows"]:
        place = found.setdefault((row["heads"], row["setting"]), {})
        place[row["task"], row["measure"]] = np.array(row["texts"])
    settings = list(dict.fromkeys(setting for _, setting in found))
    names = ["", *result["choices"]]
    order = sorted(found, key=lambda x: (settings.index(x[1]), names.index(x[0])))
    return {choice: found[choice] for choice in order}


def _columns(found: Mapping[Choice, Scores]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(column for scores in found.values() for column in scores))


def _with_nats(found: Mapping[Choice, Scores]) -> list[str]:
    """Return the tasks of which there is a likelihood."""
    return [task for task, measure in _columns(found) if measure == "nll"]


def _title(task: str) -> str:
    number = task.removeprefix("passkeys-")
    words = f"{number} passkey{'s' * (number != '1')}" if number != task else task
    return _WORDS.get(task, words)


def _table(found: Mapping[Choice, Scores], choices: Sequence[Choice]) -> str:
    columns = _columns(found)
    return markdown.table(
        ("heads", "caches", *(f"{_title(task)}: {_NAMES[measure]}" for task, measure in columns)),
        [
            (
                heads or "all",
                setting,
                *(
                    _WRITE[column[1]](found[heads, setting][column])
                    if column in found[heads, setting]
                    else None
                    for column in columns
                ),
            )
            for heads, setting in choices
        ],
    )


def differences(found: Mapping[Choice, Scores], other: Choice) -> str:
    """Write the differences in nats from another choice, text by text.

    Args:
      found: the scores.
      other: what is subtracted; without a setting, the same pattern's at the same setting.
    """
    tasks = _with_nats(found)
    lines = []
    for heads, setting in found:
        if heads in ("", other[0]):
            continue
        mine, rival = found[heads, setting], found[other[0], other[1] or setting]
        changes = (mine[task, "nll"] - rival[task, "nll"] for task in tasks)
        lines.append((heads, setting, *map(statistics.change, changes)))
    return markdown.table(("heads", "caches", *map(_title, tasks)), lines)


def png(result: Result) -> bytes:
    """Draw what every choice loses against full caches, a panel for each task."""
    found = by_choice(result)
    tasks = _with_nats(found)
    choices = [choice for choice in found if choice[0]]
    figure, panels = figures.new_figure(
        3.4 * len(tasks) + 1.6,
        2.0 + 0.4 * len(choices),
        ncols=len(tasks),
        sharey=True,
        squeeze=False,
    )
    settings = list(dict.fromkeys(setting for _, setting in choices))
    full = found["", FULL]
    for panel, task in zip(panels[0], tasks, strict=True):
        panel.axvline(0.0, color="grey", linewidth=1.0)
        for place, choice in enumerate(choices):
            change = found[choice][task, "nll"] - full[task, "nll"]
            panel.errorbar(
                np.mean(change),
                place,
                xerr=2 * statistics.standard_error(change),
                color=f"C{settings.index(choice[1])}",
                marker="o",
                capsize=3,
            )
        panel.set_title(_title(task), fontsize=10)
        panel.set_xlabel("nats per token")
        panel.grid(alpha=0.3)
    panels[0, 0].set_yticks(
        range(len(choices)), [f"{heads}, {setting}" for heads, setting in choices], fontsize=9
    )
    panels[0, 0].set_ylim(len(choices) - 0.5, -0.5)
    figure.suptitle(
        f"{result['model']}: NLL minus that of full caches (sink {result['sink']}, recent "
        f"{result['recent']}, {result['dtype']})\nbars: two standard errors over texts, paired; "
        f"{'; '.join(result['hardware'])}, jax {', '.join(result['jax'])}",
        fontsize=10,
    )
    return figures.png(figure, dpi=110)

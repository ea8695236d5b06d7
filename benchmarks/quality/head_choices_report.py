"""Tables and picture of benchmarks.head_choices."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from benchmarks.serving.report import token_axis
from duo_jax import files
from duo_jax.data.passkey_templates import in_words
from duo_jax.evaluate.results.result_json import to_json
from duo_jax.reports import figures, markdown
from duo_jax.reports.statistics import standard_error

FULL, STREAMING, RANDOM = "full attention", "all streaming", "random"
PROFILE = "profile"  # the pattern that others are compared with
MEASURES = {
    "exact": "exact retrieval",
    "tokens": "tokens right",
    "nll": "answer NLL",
    "kl": "KL from full",
}
_COMPARED = {"exact": "points", "nll": "nats"}  # by differences, and drawn
_AXES = {"exact": "exact retrieval (%)", "nll": "answer NLL (nats per token)"}
_FRACTIONS = ("exact", "tokens")  # written in per cent
_MARKERS = {STREAMING: "v", RANDOM: "s"}  # of a single length, lines cannot be told apart

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """One choice of heads at one length, or at all of them, with all its seeds."""

    heads: str
    sparsity: float
    retrieval_heads: int
    scores: dict[str, Float[np.ndarray, "seeds texts"] | None]

    def texts(self, score: str) -> Float[np.ndarray, " texts"] | None:
        """Return each text's mean over seeds."""
        found = self.scores[score]
        return None if found is None else found.mean(axis=0)


def write(result: Result, out: pathlib.Path) -> None:
    """Write JSON, the tables and the picture."""
    files.write_text(out, to_json(result))
    title = f"# Choices of heads on {result['model']}\n\n"
    files.write_text(out.with_suffix(".md"), f"{title}{to_markdown(result)}\n")
    plot(result, out.with_suffix(".png"))


def to_markdown(result: Result) -> str:
    """Write the settings, and a table for each number of passkeys."""
    settings = result["settings"]
    heads = result["layers"] * result["kv_heads"]
    parts = [
        f"{result['model']}, {heads} KV heads, {result['dtype']}; sink {settings['sink']}, recent "
        f"{settings['recent']}; passkeys of "
        f"{in_words(settings['data']['words'], settings['data']['passkey_words'])} in "
        f"{_haystacks(result)}. ±: two standard errors over texts (none for a single text), of "
        "differences paired by text; of several seeds, each text's mean over them, and in brackets "
        "the range of the seeds' means. Points are of exact retrieval, nats per token. "
        f"{result['hardware']}, "
        f"jax {result['jax']}, {result['run_minutes']} minutes.",
    ]
    for passkeys in _numbers(result):
        keys = "1 passkey" if passkeys == 1 else f"{passkeys} passkeys"
        parts += [f"### {keys} in a text", _table(result, passkeys)]
    return "\n\n".join(parts)


def lines(result: Result, passkeys: int, length: int | None) -> list[Line]:
    """Return the lines of a table at one length; None: with the texts of all lengths together."""
    lengths = [length] if length else _lengths(result)
    by_place: dict[tuple[str, float], dict[int, list[Result]]] = {}
    for row in result["rows"]:
        if row["num_passkeys"] == passkeys and row["length"] in lengths:
            place = by_place.setdefault((row["heads"], row["sparsity"]), {})
            place.setdefault(row["length"], []).append(row)
    names = [name for name in result["choices"] if name != STREAMING] + [STREAMING]
    found = [
        Line(
            heads=heads,
            sparsity=sparsity,
            retrieval_heads=next(iter(rows.values()))[0]["retrieval_heads"],
            scores={score: _joined(list(rows.values()), score) for score in MEASURES},
        )
        for (heads, sparsity), rows in by_place.items()
        if len(rows) == len(lengths)
    ]
    return sorted(found, key=lambda line: (line.sparsity, names.index(line.heads)))


def difference(
    found: Sequence[Line], line: Line, other: str, score: str
) -> Float[np.ndarray, " texts"] | None:
    """Return a line's score minus that of another choice, text by text.

    None if there is no such choice with as many heads, or it is the line itself.
    """
    rivals = [
        rival
        for rival in found
        if rival.heads == other and (other == FULL or rival.sparsity == line.sparsity)
    ]
    mine = line.texts(score)
    theirs = rivals[0].texts(score) if rivals else None
    if mine is None or theirs is None or rivals[0] is line:
        return None
    return mine - theirs


def plot(result: Result, path: pathlib.Path) -> None:
    """Draw scores over the length, a column for each sparsity, a row for each measure and table."""
    sparsities, numbers = sorted(result["settings"]["sparsities"]), _numbers(result)
    panels = [(number, score) for number in numbers for score in _COMPARED]
    figure, axes = figures.new_figure(
        max(10.0, 1.2 + 4.8 * len(sparsities)),  # of the title
        1.2 + 2.9 * len(panels),
        nrows=len(panels),
        ncols=len(sparsities),
        squeeze=False,
        sharey="row",
    )
    for of_row, (number, score) in zip(axes, panels, strict=True):
        for panel, sparsity in zip(of_row, sparsities, strict=True):
            _draw(panel, result, number, score, sparsity)
            keys = "1 passkey" if number == 1 else f"{number} passkeys"
            panel.set_title(f"{keys}, {100 * sparsity:g}% of the heads streaming", fontsize=10)
        of_row[0].set_ylabel(_AXES[score])
    for panel in axes[-1]:
        panel.set_xlabel("text (tokens)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    settings = result["settings"]
    figure.suptitle(
        f"Choices of heads on {result['model']} ({result['layers']} layers x {result['kv_heads']} "
        f"KV heads, {result['dtype']}, sink {settings['sink']}, recent {settings['recent']})\n"
        f"bars: two standard errors over texts; {result['hardware']}, jax {result['jax']}",
        fontsize=10,
    )
    figures.save(figure, path, dpi=130)


def _draw(panel: Any, result: Result, passkeys: int, score: str, sparsity: float) -> None:
    lengths = [n for n in _lengths(result) if lines(result, passkeys, n)]
    at_lengths = [lines(result, passkeys, length) for length in lengths]
    scale = 100 if score in _FRACTIONS else 1
    styles = {FULL: ("black", "-"), STREAMING: ("black", ":"), RANDOM: ("grey", "--")}
    styles = {name: style for name, style in styles.items() if name in result["choices"]}
    names = [name for name in result["choices"] if name not in styles]
    # C7 is the grey of random heads.
    colours = itertools.cycle([f"C{number}" for number in range(10) if number != 7])
    styles |= {name: (colour, "-") for name, colour in zip(names, colours, strict=False)}
    for number, (name, (colour, dash)) in enumerate(styles.items()):
        wanted = {FULL: 0.0, STREAMING: 1.0}.get(name, sparsity)
        points = [
            (length, values)
            for length, found in zip(lengths, at_lengths, strict=True)
            for line in found
            if (line.heads, line.sparsity) == (name, wanted)
            and (values := line.texts(score)) is not None
        ]
        # Beside one another: where choices agree, one would hide the other.
        shift = 2 ** (0.035 * (number - (len(styles) - 1) / 2))
        panel.errorbar(
            [length * shift for length, _ in points],
            [scale * float(np.mean(values)) for _, values in points],
            yerr=[2 * scale * standard_error(values) for _, values in points],
            color=colour,
            linestyle=dash,
            marker=_MARKERS.get(name, "o"),
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=name,
        )
    token_axis(panel, lengths)
    panel.get_legend().remove()  # one for all panels
    panel.minorticks_off()
    panel.set_ylim(*((-4, 104) if score in _FRACTIONS else (0, None)))


def _table(result: Result, passkeys: int) -> str:
    others = [name for name in (FULL, PROFILE) if name in result["choices"]]
    compared = [(other, score) for other in others for score in _COMPARED]
    columns = (
        *("tokens", "texts", "heads", "streaming", "retrieval heads"),
        *MEASURES.values(),
        *(f"minus {other}, {_COMPARED[score]}" for other, score in compared),
    )
    return markdown.table(columns, _cells(result, passkeys, compared))


def _cells(
    result: Result, passkeys: int, compared: Sequence[tuple[str, str]]
) -> Iterator[list[str]]:
    """Yield the rows of a table: those of every length, then those of all lengths together."""
    lengths = _lengths(result)
    for length in (*lengths, *([None] if len(lengths) > 1 else [])):
        found = lines(result, passkeys, length)
        for line in found:
            exact = line.texts("exact")
            changes = [(score, difference(found, line, other, score)) for other, score in compared]
            yield [
                f"{length:,}" if length else "all",
                str(0 if exact is None else exact.size),
                line.heads,
                f"{100 * line.sparsity:g}%",
                str(line.retrieval_heads),
                *(_mean(line, score) for score in MEASURES),
                *("" if x is None else _number(x, score, "+") for score, x in changes),
            ]


def _mean(line: Line, score: str) -> str:
    """Write a mean, its error over texts, and the range of several seeds."""
    seeds, texts = line.scores[score], line.texts(score)
    if seeds is None or texts is None:
        return ""
    unit = "%" if score in _FRACTIONS else ""
    spread = ""
    if len(seeds) > 1:
        lowest, highest = seeds.mean(axis=1).min(), seeds.mean(axis=1).max()
        spread = f" ({_one(lowest, score)} to {_one(highest, score)})"
    mean, *error = _number(texts, score).split(" ", 1)
    return " ".join([f"{mean}{unit}", *error]) + spread


def _number(texts: Float[np.ndarray, " texts"], score: str, sign: str = "") -> str:
    """Write a mean and two standard errors; of a single text, which has none, the value alone."""
    mean = _one(float(texts.mean()), score, sign)
    return mean if texts.size < 2 else f"{mean} ± {_one(2 * standard_error(texts), score)}"


def _one(value: float, score: str, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if score in _FRACTIONS else f"{value:{sign}.3f}"


def _joined(
    by_length: Sequence[Sequence[Result]], score: str
) -> Float[np.ndarray, "seeds texts"] | None:
    """Return a score of the texts of several lengths side by side; None: it was not measured."""
    if any(row[score] is None for rows in by_length for row in rows):
        return None
    return np.concatenate([np.array([row[score] for row in rows]) for rows in by_length], axis=1)


def _numbers(result: Result) -> list[int]:
    return sorted({row["num_passkeys"] for row in result["rows"]})


def _lengths(result: Result) -> list[int]:
    return sorted({row["length"] for row in result["rows"]})


def _haystacks(result: Result) -> str:
    """Return which texts were read, and from which length on another one."""
    shortest: dict[str, int] = {}
    for row in sorted(result["rows"], key=lambda row: row["length"]):
        shortest.setdefault(row["haystack"], row["length"])
    first, *others = shortest.items()
    return ", ".join([first[0], *(f"from {length:,} tokens {name}" for name, length in others)])

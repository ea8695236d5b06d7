"""docs/results.md: every table of the committed results, and published numbers beside them.

    python -m benchmarks.results_page

Everything comes from the files in benchmarks/results; each section says where it ran, and with
what. Nothing is measured.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import command, quantised, serving_load
from benchmarks.gpu.models import LLAMA_2_7B, LLAMA_3_8B
from benchmarks.quality import ablations_report, head_choices_report, published
from duo_jax import files
from duo_jax.evaluate.compare import report as compare_report
from duo_jax.evaluate.results import describe, heat_map
from duo_jax.reports import markdown
from duo_jax.schema.json_reader import read_json

_HEAD = """\
# Results

Written by `python -m benchmarks.results_page` from the files in `benchmarks/results`; do not edit
it. All of it was measured on the demo model, a Llama of 722 thousand parameters that finds passkeys
in up to 1,024 tokens, unless a line says otherwise. **Nothing here was measured on a model of
billions of parameters, or on a GPU.** Numbers of others are marked as published.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageFlags:
    """Flags of the command."""

    results: pathlib.Path = pathlib.Path("benchmarks/results")
    """Where the result files are."""
    out: pathlib.Path = pathlib.Path("docs/results.md")
    """The page to write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One result file and how it is shown."""

    title: str
    name: str  # of the JSON file and, where there is one, of the picture
    text: str
    table: Callable[[dict[str, Any]], str]
    picture: bool = True
    command: str = ""  # that measures it, shown in place of a result that is not there yet


SECTIONS = (
    Section(
        title="One needle at every depth",
        name="needle",
        text=(
            "A passkey of eight words, hidden once; greedy continuation of the question. ± is two "
            "standard errors over texts."
        ),
        table=heat_map.to_markdown,
    ),
    Section(
        title="Several passkeys, by length and depth",
        name="passkeys",
        text=(
            "Each text is read once, then asked for all of its passkeys in turn: the question is "
            "not known when the text is read. A passkey counts if greedy decoding would write all "
            "of it. ± is two standard errors over texts, of all lengths."
        ),
        table=heat_map.to_markdown,
    ),
    Section(
        title="Beside other methods, at equal bytes of cache",
        name="compare",
        text=(
            "Bytes are those of the live buffers. *needle*: the question is part of the prompt, as "
            "token-eviction papers measure. *passkeys*: the text is compressed before any question "
            "is asked, as in a conversation about a long text. Measured before KVzip, ThinK, "
            "ShadowKV and CHAI were added: [those](evaluate.md#beside-other-methods). Learned "
            "gates are below the attention profile in one place, one needle with a quarter of the "
            "bytes, inside the error: only two heads are kept there, three of the second layer are "
            "about equal (gates .973, .969, .966; profile .984 each), and each method leaves out "
            "another one."
        ),
        table=compare_report.to_markdown,
    ),
    Section(
        title="Ablations",
        name="ablations",
        text="How heads are chosen, what streaming heads see, and how many tokens of it.",
        table=lambda result: _without_title(ablations_report.to_markdown(result)),
    ),
    Section(
        title="Choices of heads on a pretrained model",
        name="head_choices",
        text=(
            "Pass keys in held-out text that no pattern was made on: how much is lost with the "
            "same number of retrieval heads, by how they were chosen. All choices answer the same "
            "texts; *minus* columns are differences, text by text. *profile*: the attention "
            "profile, which needs no training."
        ),
        table=head_choices_report.to_markdown,
        command="python -m benchmarks.head_choices --model M --patterns learned=P profile=Q",
    ),
    Section(
        title="Smaller caches and weights",
        name="quantised",
        text=(
            "± is two standard errors over texts; *change* is against `duo 50%` in the model's own "
            "dtype, text by text."
        ),
        table=quantised.to_markdown,
        picture=False,
    ),
    *(
        Section(
            title=f"A server under load, {model}",
            name=f"serving_load_{name}",
            text=(
                "Clients ask at the same time, each for its next answer when it has the last one. "
                "*between*: two pieces of a stream, which wait while another prompt is read."
            ),
            table=serving_load.to_markdown,
            picture=False,
            command="python -m benchmarks.serving_load --model M",
        )
        for name, model in (("demo", "demo model"), ("smollm2", "SmolLM2-135M-Instruct"))
    ),
)


def write_page(flags: PageFlags) -> None:
    """Write the page.

    Raises:
      InputError: a result file is missing or damaged.
    """
    parts = [_HEAD]
    for section in SECTIONS:
        file = flags.results / f"{section.name}.json"
        parts += [f"## {section.title}\n", f"{section.text}\n"]
        if section.command and not files.exists(file):
            parts.append(f"Not measured yet; `{section.command}` measures it.\n")
            continue
        result = read_json(file)
        parts.append(f"{where(result)}\n")
        parts.append(section.table(result) + "\n")
        if section.picture:
            parts.append(f"![{section.title}](../{flags.results}/{section.name}.png)\n")
    parts.append(_published())
    files.write_text(flags.out, "\n".join(parts))
    print(f"written: {flags.out}")


def where(result: dict[str, Any]) -> str:
    """Say what a result was measured on and with."""
    words = [result["hardware"], f"jax {result['jax']}", f"Python {result['python']}"]
    if "prefill_mode" in result and "prefill_chunk" in result:
        words.append(describe.in_words(result))
    elif "dtype" in result:
        words.append(result["dtype"])
    seed = result.get("seed", result.get("settings", {}).get("seed"))
    if seed is not None:
        words.append(f"seed {seed}")
    return f"`{result['command']}`; {'; '.join(words)}."


def _without_title(markdown: str) -> str:
    lines = markdown.splitlines()
    return "\n".join(lines[1:] if lines[0].startswith("# ") else lines).strip()


def _published() -> str:
    """Write the tables of others."""
    efficiency = markdown.table(("full caches / DuoAttention", "published"), _efficiency())
    longbench = markdown.table(
        ("model", *published.LONGBENCH_METHODS),
        [(model, *(f"{x:.2f}" for x in scores)) for model, scores in published.LONGBENCH],
    )
    ruler = markdown.table(
        ("heads by", *(f"{share:g}% streaming" for share in published.RULER_STREAMING)),
        [(heads, *(f"{x:.2f}" for x in scores)) for heads, scores in published.RULER],
    )
    return f"""\
## Published by others

From {published.DUO}, measured by its authors on one A100-80G, BF16, batch 1. Ours on \
an H200 are [beside them](gpu.md#speed).

{efficiency}

LongBench, average of 21 tasks, published in the same paper. Ours: not measured yet \
(`python -m duo_jax.evaluate lm-eval --tasks longbench` measures it).

{longbench}

RULER at 4K, Llama-3.1-8B-Instruct, published on kvpress' leaderboard (dense prefill, question \
unseen when the cache is cut; full caches {published.RULER_FULL}). Ours: not measured yet.

{ruler}
"""


def _efficiency() -> Iterator[tuple[str, str]]:
    """Yield the speed-ups and savings of the models that benchmarks.gpu_report measures."""
    for model in (LLAMA_2_7B, LLAMA_3_8B):
        of = f"{model.name}, {model.variants[0].retrieval:.0%} retrieval heads"
        for headline in model.headlines:
            what = f"{headline.what}, {of}, {headline.tokens // 1000}K tokens"
            yield what, f"{headline.published:.2f}x"
        yield f"memory, {of}", f"{model.memory_saving:.2f}x"


if __name__ == "__main__":
    command.run(write_page, PageFlags)

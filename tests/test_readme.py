"""The README tells the truth: its examples print what it shows, its table is that of results."""

import json
import pathlib
import re
import shlex

import pytest

from duo_jax import generate

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_fits_on_a_page():
    assert len(README.splitlines()) <= 150


def test_the_test_command_is_where_ci_finds_it():
    part = README.split("<!-- test command -->\n")[1].split("\n<!-- end -->")[0]
    fence, command, end = part.splitlines()  # .ci/run takes the lines that are no fences
    assert (fence, end) == ("```bash", "```")
    assert command.endswith("-m pytest")


def serve_examples() -> list[tuple[str, str]]:
    """Return the commands of "try it", and what the README says they print."""
    part = README.split("<!-- serve example -->")[1].split("<!-- end -->")[0]
    blocks = re.findall(r"```\n\$ (.*?)\n(.*?)```", part, re.DOTALL)
    assert len(blocks) == 2
    return blocks


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        pytest.param(*example, id=example[0], marks=[pytest.mark.slow] * (number > 0))
        for number, example in enumerate(serve_examples())
    ],
)
def test_serve_examples_print_what_the_readme_says(command, printed, capsys):
    python, minus_m, module, *args = shlex.split(command)
    assert (python, minus_m, module) == ("python", "-m", "duo_jax.generate")
    generate.main(args)
    captured = capsys.readouterr()

    def without_times(text: str) -> str:
        return re.sub(r"[\d.]+ (s|tokens/s)\b", r"_ \1", text)

    assert without_times(captured.out + captured.err) == without_times(printed)


def test_what_it_prints_is_the_passkey_and_is_not_while_every_head_streams():
    """The notebook's stored output says so of other fractions, through the Python interface."""
    prompt = (ROOT / "duo_jax/demo/prompt.txt").read_text(encoding="utf-8")
    [passkey] = [line for line in prompt.splitlines() if line.startswith("Passkey third ")]
    (_, half), (all_streaming, none) = serve_examples()
    assert f"Repeat this.\n{passkey.removesuffix('.')}\n" in half
    assert all_streaming.endswith("--sparsity 1")
    assert passkey.removesuffix(".") not in none


def measured_row(benchmark: str, geometry: str) -> str:
    """Return a row of the table of savings, from a result file in benchmarks/results."""
    result = json.loads((ROOT / f"benchmarks/results/{benchmark}.json").read_text())
    axis, time = {"decode": ("context", "ms"), "prefill": ("length", "seconds")}[benchmark]
    longest = max(row[axis] for row in result["rows"])
    cells = []
    for name in ("full", "duo 50%", "duo 25%"):
        (row,) = (
            row
            for row in result["rows"]
            if (row[axis], row["geometry"], row["name"]) == (longest, geometry, name)
        )
        spent = row[time]["median"]
        spent = f"{spent:.0f} ms" if benchmark == "decode" else f"{spent:.1f} s"
        cell = f"{spent}, {row['cache_bytes'] / 1e6:,.0f} MB"
        cells.append(cell if name == "full" else f"{cell} ({row['speedup']:.2f}x)")
    what = f"one token after {longest:,}" if benchmark == "decode" else f"read {longest:,} tokens"
    return f"| {what}, {geometry.upper()} | {' | '.join(cells)} |"


def planned_row(text: str, *, weights: str, kv: str) -> str:
    """Return a row of the table of savings, from the planner's example, which is tested there."""
    example = (ROOT / "docs/planner.md").read_text(encoding="utf-8")
    longest = {
        caches: re.search(rf"^{caches} +{weights} +{kv} +([\d,]+)", example, re.MULTILINE)[1]
        for caches in ("full", "duo")
    }
    return f"| {text} | {longest['full']} | {longest['duo']} | |"


def test_savings_are_those_of_the_committed_results():
    table = README.split("<!-- savings table -->\n")[1].split("\n<!-- end -->")[0]
    assert table.splitlines()[2:] == [
        measured_row("decode", "gqa"),
        measured_row("decode", "mha"),
        measured_row("prefill", "gqa"),
        measured_row("prefill", "mha"),
        planned_row("longest context, Llama-3-8B, A100-80G", weights="model", kv="model"),
        planned_row("the same with int8 weights, int4 caches", weights="int8", kv="int4"),
    ]

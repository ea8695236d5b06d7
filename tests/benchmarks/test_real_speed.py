"""Contenders say the same on the demo model; speeds, ratios and what is left out are right."""

import importlib.util
import io
import json
import pathlib
import re
import sys
from typing import Any

import jax
import pytest

from benchmarks import real_speed
from benchmarks.contenders import answering
from benchmarks.contenders.duo import Duo
from benchmarks.contenders.report import REPORT
from benchmarks.real_speed import RealSpeedFlags
from duo_jax.errors import InputError
from tests.small_demo import small_demo

COPY = 1e10
PROMPT = list(range(40, 60))
DEMO = {"model": str(small_demo()), "pattern": "none"}


class Answers:
    """A contender whose runs are given."""

    def __init__(self, runs):
        self._runs = iter(runs)

    def measure(self, what, *, tokens, count):
        assert (len(tokens), count) == (8, 3)
        return {"peak_bytes": 5} if what == "warm_up" else next(self._runs)


def run(decode_seconds, *, tokens=(1, 2, 3)):
    return {
        "prefill_seconds": 4.0,
        "decode_seconds": decode_seconds,
        "tokens": list(tokens),
        "step_bytes": 10**9,
        "peak_bytes": int(decode_seconds * 10),
    }


def rows(full, other, *, module="eager"):
    named = [(real_speed.FULL, "duo", full), ("other", module, other)]
    running: Any = [
        (
            real_speed.Contender(
                name=name, module=module, weights="", python=pathlib.Path(), settings={}
            ),
            Answers(runs),
        )
        for name, module, runs in named
    ]
    flags = RealSpeedFlags(new_tokens=3, rounds=len(full))
    return real_speed._rows(flags, running, [0] * 8, COPY)


def test_speeds_are_medians_over_rounds():
    full, other = rows([run(1.0), run(2.0), run(4.0)], [run(0.5, tokens=(1, 2, 5))] * 3)
    assert full["prefill"]["median"] == 8 / 4
    assert full["decode"]["median"] == 2 / 2.0  # the first of three tokens is the prompt's
    assert full["gb_per_second"] == 1.0
    assert (full["peak_bytes"], full["start_peak_bytes"]) == (40, 5)
    assert (full["decode_ratio"], other["prefill_ratio"], other["decode_ratio"]) == (1, 1, 4)
    assert (full["same_tokens"], other["same_tokens"]) == (3, 2)


def test_no_ratio_to_a_library_that_hardly_reads_its_weights():
    _, slow = rows([run(1.0)], [run(2.1)])
    assert slow["absurd"]
    assert not slow.keys() & {"decode_ratio", "prefill_ratio"}
    _, faster = rows([run(1.0)], [run(1.9)])
    assert not faster["absurd"]
    _, ours = rows([run(1.0)], [run(2.1)], module="duo")
    assert ours["decode_ratio"] == pytest.approx(1 / 2.1)  # our own slowness is no excuse


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # older ones know no other
@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_ours_and_transformers_say_the_same_and_read_as_much(cache):
    from benchmarks.contenders.eager import Eager

    ours = Duo(DEMO | {"weights": "model"})
    theirs = Eager({"model": DEMO["model"], "cache": cache, "threads": 1})
    theirs.warm_up(PROMPT, 6)
    assert list(ours.generate(PROMPT, 6)) == list(theirs.generate(PROMPT, 6))
    assert ours.step_bytes(100) == theirs.step_bytes(100)


@pytest.mark.slow
def test_warming_up_compiles_all_that_is_timed(caplog):
    ours = Duo(DEMO | {"pattern": "random", "sparsity": 0.5, "sink_size": 4, "recent_size": 8})
    ours.warm_up(PROMPT, 6)
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        assert len(list(ours.generate(PROMPT, 6))) == 6
        assert "Compiling" not in caplog.text
        list(ours.generate(PROMPT * 40, 6))
        assert "Compiling" in caplog.text


class Counter:
    """Writes one number after another."""

    def __init__(self, settings):
        self.versions = settings

    def generate(self, tokens, count):
        yield from range(len(tokens), len(tokens) + count)

    def warm_up(self, tokens, count):
        pass

    def step_bytes(self, context):
        return context


def test_a_contender_answers_line_by_line(monkeypatch, capsys):
    request = {"tokens": [1, 2], "count": 4}
    lines = [json.dumps({"measure": what, **request}) for what in ("warm_up", "generate")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setattr(sys, "argv", ["contender", '{"counter": "1"}'])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    answering.answer(Counter)
    versions, warm, generated = map(json.loads, capsys.readouterr().out.splitlines())
    assert versions == {"counter": "1"}
    assert warm["peak_bytes"] > 0
    assert generated["tokens"] == [2, 3, 4, 5]
    assert generated["step_bytes"] == 2 + 2  # in the middle of the steps
    assert generated["prefill_seconds"] > 0 <= generated["decode_seconds"]


@pytest.mark.slow
def test_the_command_measures_a_process_and_names_what_is_not_there(tmp_path, capsys, monkeypatch):
    everything = real_speed.contenders
    monkeypatch.setattr(
        real_speed, "contenders", lambda *args: [everything(*args)[i] for i in (0, -1)]
    )
    monkeypatch.setattr(real_speed.machine, "copy_bandwidth", lambda: COPY)
    flags = RealSpeedFlags(
        model="demo",
        lengths=(20,),
        new_tokens=3,
        rounds=1,
        llama_cpp_python=pathlib.Path("no/such/python"),
        out=tmp_path / "speed",
    )
    real_speed.main(flags)
    result = json.loads((tmp_path / "speed.json").read_text())
    assert [row["name"] for row in result["rows"]] == [real_speed.FULL]
    assert list(result["versions"]) == [real_speed.FULL]
    (skipped,) = result["skipped"]
    assert re.match("llama.cpp is skipped: there is no .*no/such/python;", skipped)
    table = (tmp_path / "speed.md").read_text()
    assert table == REPORT.to_markdown(result) + "\n" == capsys.readouterr().out
    assert "; copies 10.0 GB/s; " in table
    assert (tmp_path / "speed.png").stat().st_size > 0


def test_lengths_that_the_model_cannot_read():
    flags = RealSpeedFlags(model="demo", lengths=(1 << 20,))
    with pytest.raises(InputError, match="1,048,576 tokens and 64 new ones are too many"):
        real_speed.measure(flags)
    with pytest.raises(InputError, match="two new tokens"):
        RealSpeedFlags(new_tokens=1)

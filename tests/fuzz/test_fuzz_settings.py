"""Patterns, presets and the settings of work folders."""

import dataclasses
import json

import numpy as np
from hypothesis import strategies as st

from duo_jax.cli import presets, workdir
from duo_jax.evaluate.needle.command import NeedleConfig
from duo_jax.heads.pattern import choose_retrieval_heads, load_pattern
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import LONG, damaged_bytes, json_files
from tests.fuzz.seeds import DEMO, of_cases
from train.identify.flags import IdentifyConfig, default_config

_CELLS = """
    nan inf -inf 1e999 1e-400 5e-324 1e308 -3 0x1p3 1_000 True 1,5 1e ++1 # 0.5#x "1" \u0661 1\u00a0
""".split()
_CELLS += ["", " ", " 1 ", "\v1", "1 2", "9" * 5_000, "0." + "3" * LONG, "x" * LONG, "1\r", "\0"]
_GATES = (DEMO / "pattern" / "full_attention_heads.tsv").read_text()
_SIZES = [(DEMO / "pattern" / "config.json").read_text(), *of_cases("pattern-*/config.json")]


@st.composite
def _tables(draw: st.DrawFn) -> bytes:
    rows = [row.split("\t") for row in _GATES.splitlines()]
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        row = draw(st.sampled_from(rows))
        at = draw(st.integers(0, len(row) - 1))
        action = draw(st.sampled_from(["cell", "cell", "cell", "delete", "wide", "empty"]))
        if action == "cell":
            row[at] = draw(st.sampled_from(_CELLS) | st.floats().map(repr) | st.text(max_size=5))
        elif action == "delete" and len(row) > 1:
            del row[at]
        elif action == "wide":
            rows = [[*other, *["0.5"] * draw(st.sampled_from([1, LONG]))] for other in rows]
        else:
            rows.insert(0, [""])
    end = draw(st.sampled_from(["\n", "\n", "\r\n", "\r", "\n\n"]))
    return end.join(map("\t".join, rows)).encode("utf-8", "replace")


@fuzzed(st.one_of(_tables(), _tables(), damaged_bytes([_GATES.encode()])))
def test_gates_are_the_numbers_of_the_table(content, folder):
    (folder / "full_attention_heads.tsv").write_bytes(content)
    (folder / "config.json").write_text(_SIZES[0])
    pattern = attempt(lambda: load_pattern(folder), size=len(content))
    if pattern is not REFUSED:
        lines = content.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
        theirs = [list(map(float, line.split("\t"))) for line in lines if line.strip()]
        assert np.array_equal(pattern.gates, np.array(theirs))
        assert attempt(lambda: choose_retrieval_heads(pattern.gates, sparsity=0.5)) is not REFUSED


@fuzzed(json_files(_SIZES))
def test_sizes_of_a_pattern_are_those_of_the_file(content, folder):
    (folder / "full_attention_heads.tsv").write_text(_GATES)
    (folder / "config.json").write_bytes(content)
    pattern = attempt(lambda: load_pattern(folder), size=len(content))
    if pattern is not REFUSED:
        found = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
        assert json.dumps({**found, **pattern.extra}, sort_keys=True) == json.dumps(
            json.loads(content), sort_keys=True
        )


def check_fields(config, raw):
    """Compare the fields that a preset names."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))

    def same(ours, theirs):
        if isinstance(theirs, dict):
            return all(same(ours[key], value) for key, value in theirs.items())
        return ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool)

    assert same(fields, raw)


@fuzzed(json_files([(DEMO / "identify.json").read_text(), *of_cases("presets-*/identify.json")]))
def test_a_preset_of_identify_sets_what_it_says(content, folder):
    (folder / "identify.json").write_bytes(content)
    config = attempt(lambda: default_config("m", folder), size=len(content))
    if config is not REFUSED:
        check_fields(config, json.loads(content))
        attempt(lambda: config.check_method(IdentifyConfig()))


@fuzzed(json_files([(DEMO / "evaluate.json").read_text()]))
def test_a_preset_of_evaluate_sets_what_it_says(content, folder):
    file = folder / "evaluate.json"
    file.write_bytes(content)
    config = attempt(
        lambda: presets.load(NeedleConfig(model="m"), file, part="needle"), size=len(content)
    )
    if config is not REFUSED:
        check_fields(config, json.loads(content).get("needle", {}))


_SETTINGS = {"seed": 1, "model": "m", "rate": 0.5, "on": True, "data": {"lengths": [1, 2, 3]}}


@fuzzed(json_files([json.dumps(_SETTINGS), *of_cases("workfolder-*/config.json")]))
def test_a_work_folder_belongs_to_its_own_settings_only(content, folder):
    (folder / "config.json").write_bytes(content)
    found = attempt(lambda: workdir.check(folder, _SETTINGS), size=len(content))
    if found is not REFUSED:
        raw = json.loads(content)
        assert {name: raw.get(name) for name in _SETTINGS} == _SETTINGS
        assert all(raw[name] is None for name in raw.keys() - _SETTINGS.keys())

"""The planner: bytes, longest contexts, tables, pictures, refusals."""

import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import time

import jax
import numpy as np
import pytest
from matplotlib import image

from duo_jax.cache import cache_bytes
from duo_jax.heads.pattern import Pattern, save_pattern
from duo_jax.heads.split import DuoConfig
from duo_jax.model.hf_config import parse_config
from duo_jax.plan import gpus
from duo_jax.plan.__main__ import main
from duo_jax.plan.estimate import Workload, estimate
from duo_jax.plan.planner import cheapest, plan
from duo_jax.plan.settings import Setting, all_settings
from duo_jax.serve import ahead_of_time as compiled
from kernels import aot
from tests.models import llama

ROOT = pathlib.Path(__file__).parents[3]
PUBLISHED = ROOT.parent / "shared" / "attn_patterns" / "Llama-3-8B-Instruct-Gradient-4194k"
GB = 1e9
# Llama-3-8B's sizes, but for its 32 layers.
SMALL = llama(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=500_000,
)
WORKLOAD = Workload(
    config=DuoConfig(architecture=parse_config(SMALL), retrieval_counts=(2, 6)),
    batch_size=2,
    chunk=1000,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder that holds a config.json and a pattern, and nothing else."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SMALL))
    gates = np.random.default_rng(0).random((2, 8))
    save_pattern(Pattern(gates=gates, sink_size=128, recent_size=256), folder / "pattern")
    return folder


@pytest.fixture
def printed(capsys, model, unhooked):
    """Run the command; return what it prints. Hints are checked where estimates are tested."""
    del unhooked

    def run(*flags: str) -> str:
        main(["--model", str(model), *flags])
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def rows_of(text: str) -> dict[tuple[str, ...], list[str]]:
    """Return the cells of a table by caches, weights and KV."""
    cells = [line.split() for line in text.splitlines() if line.startswith(("full ", "duo "))]
    return {tuple(row[:3]): row[3:] for row in cells}


# What is counted, is exact.


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kv", ["model", "bf16", "int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("context", [1, 63, 64, 1000])
def test_cache_bytes_are_those_that_are_allocated(kv, dtype, context):
    workload = dataclasses.replace(WORKLOAD, dtype=dtype)
    for duo, config in ((True, workload.config), (False, workload.config.all_retrieval())):
        parts = estimate(workload, Setting(duo=duo, kv=kv)).parts(context)
        expected = cache_bytes(config, batch_size=2, max_len=context, dtype=dtype, kv=kv)
        assert parts.full_cache + parts.streaming_cache == expected
        assert (parts.streaming_cache > 0) == duo


@pytest.mark.parametrize("kv", ["model", "int8", "int4", "int2"])
@pytest.mark.parametrize("counts", [(0, 0), (8, 8), (0, 3, 3, 8, 1), (7,)], ids=str)
@pytest.mark.parametrize("context", [1000, 50_000_000])  # the latter in several buffers
def test_cache_bytes_are_counted_by_head(kv, counts, context):
    model = dataclasses.replace(WORKLOAD.config.architecture, num_layers=len(counts))
    config = DuoConfig(architecture=model, retrieval_counts=counts, sink_size=3, recent_size=9)
    found = estimate(dataclasses.replace(WORKLOAD, config=config), Setting(duo=True, kv=kv))
    parts = found.parts(context)
    expected = cache_bytes(config, batch_size=2, max_len=context, dtype="bfloat16", kv=kv)
    assert parts.full_cache + parts.streaming_cache == expected


def test_weight_bytes_are_those_of_the_shapes():
    shapes = compiled.param_shapes(WORKLOAD.config.architecture, "bfloat16")
    values = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    kernels = 2 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14_336)
    channels = 2 * (128 * (32 + 2 * 8) + 4096 + 2 * 14_336 + 4096)

    def weights(name: str) -> int:
        return estimate(WORKLOAD, Setting(duo=True, weights=name)).weights

    assert weights("model") == 2 * values
    assert weights("int8") == weights("w8a8") == 2 * values - kernels + 4 * channels
    assert weights("int4") == 2 * values - kernels * 3 // 2 + kernels // 128 * 4


def test_decode_floor_reads_everything_once_but_only_one_row_of_the_embedding_per_token():
    found = estimate(WORKLOAD, Setting(duo=True))
    parts, embedding = found.parts(1000), 2 * 128_256 * 4096
    read = parts.weights - embedding + 2 * 2 * 4096 + parts.full_cache + parts.streaming_cache
    assert found.decode_floor(1000, 1e9) == pytest.approx(read / 1e9, rel=1e-12)
    # A ring that is half full is read half.
    half = found.decode_floor(192, 1e9) - found.parts(192).full_cache / 1e9
    whole = found.decode_floor(384, 1e9) - found.parts(384).full_cache / 1e9
    assert whole - half == pytest.approx(parts.streaming_cache / 2 / 1e9, rel=1e-9)


def test_a_tied_embedding_is_read_whole():
    model = dataclasses.replace(WORKLOAD.config.architecture, tie_embeddings=True)
    config = dataclasses.replace(WORKLOAD.config, architecture=model)
    found = estimate(dataclasses.replace(WORKLOAD, config=config), Setting(duo=True))
    assert found.weights_read == found.weights


# What fits.


@pytest.mark.parametrize("kv", ["model", "int4", "int2"])
@pytest.mark.parametrize("gigabytes", [4, 24, 80])
def test_the_longest_context_fits_and_the_next_does_not(kv, gigabytes):
    found = estimate(WORKLOAD, Setting(duo=True, kv=kv))
    budget = int(gigabytes * GB)
    longest = found.longest(budget)
    assert found.parts(longest).total <= budget < found.parts(longest + 1).total
    assert longest % (64 if kv == "int2" else 1) == 0


def test_a_budget_within_the_first_chunk_has_room_for_a_part_of_it():
    found = estimate(dataclasses.replace(WORKLOAD, chunk=32_000), Setting(duo=True))
    budget = (found.parts(10).total + found.parts(32_000).total) // 2
    assert 10 < found.longest(budget) < 32_000


def test_nothing_fits_where_weights_alone_are_too_large():
    found = estimate(WORKLOAD, Setting(duo=True))
    assert found.longest(found.weights) is None


def test_settings_come_in_order_of_their_loss():
    settings = all_settings(duo=True)
    assert len(settings) == len(set(settings)) == 24
    assert settings[:4] == (
        Setting(duo=False),
        Setting(duo=True),
        Setting(duo=False, kv="int8"),
        Setting(duo=True, kv="int8"),
    )
    bits = {"model": 16, "int8": 8, "int4": 4, "int2": 2}
    for index, first in enumerate(settings):
        for later in settings[index + 1 :]:  # nothing in more bits comes later
            pairs = ((first.weights, later.weights), (first.kv, later.kv))
            more = [bits[b] >= bits[a] for a, b in pairs]
            same = [a == b for a, b in pairs]
            assert not all(more) or all(same)
    assert not any(setting.duo for setting in all_settings(duo=False))


def test_the_cheapest_setting_is_the_first_that_fits():
    rows = plan(WORKLOAD, all_settings(duo=True), gpus.find("a100-80g"))
    for context in (1000, 3_000_000, 20_000_000, 60_000_000):
        row = cheapest(rows, context)
        fitting = [other for other in rows if (other.longest or 0) >= context]
        assert row == (fitting[0] if fitting else None)
    assert cheapest(rows, 10**9) is None


# The command.


def test_all_settings_have_a_row_with_the_bytes_of_the_estimate(printed):
    rows = rows_of(printed())
    assert len(rows) == 24
    for (caches, weights, kv), cells in rows.items():
        longest, *gigabytes = (float(cell.strip("*").replace(",", "")) for cell in cells[:6])
        assert sum(gigabytes[:4]) == pytest.approx(gigabytes[4], abs=0.03)
        assert gigabytes[4] == pytest.approx(82.97, abs=0.02)
        assert (gigabytes[2] > 0) == (caches == "duo") or gigabytes[2] == 0
        assert longest > 1e6, (caches, weights, kv)


FLAGS = {
    "gpu": ("--gpu", "h200"),
    "size": ("--gpu", "24"),
    "pattern": ("--pattern", "none"),
    "sparsity": ("--sparsity", "0.25"),
    "weights": ("--weights", "w8a8"),
    "kv": ("--kv", "int4"),
    "batch": ("--batch", "3"),
    "chunk": ("--chunk", "32000"),
    "dtype": ("--dtype", "float32"),
    "context": ("--context", "3000000"),
}


@pytest.mark.usefixtures("unhooked")
def test_every_flag_changes_the_plan(printed):
    plans = {name: printed(*flags).split("\n\n", 1)[1] for name, flags in FLAGS.items()}
    plans["none"] = printed().split("\n\n", 1)[1]
    assert len(set(plans.values())) == len(plans)
    assert set(rows_of(plans["pattern"])) == {
        key for key in rows_of(plans["none"]) if key[0] == "full"
    }
    assert set(rows_of(plans["kv"])) == {("full", "model", "model"), ("duo", "model", "int4")}
    assert set(rows_of(plans["weights"])) == {("full", "model", "model"), ("duo", "w8a8", "model")}


LARGE = {
    "layers": {"num_hidden_layers": 4096},
    "heads": {
        "num_hidden_layers": 4096,
        "num_attention_heads": 4096,
        "num_key_value_heads": 4096,
        "head_dim": 16,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
@pytest.mark.usefixtures("unhooked")
def test_the_largest_models_are_planned_as_quickly_as_others(sizes, tmp_path, capsys):
    """A layer that is described costs milliseconds; 4,096 of them took more than a minute."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL | sizes))
    start = time.process_time()
    main(["--model", str(tmp_path), "--pattern", "none", "--gpu", "10000"])
    assert time.process_time() - start < 2
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 12
    (tmp_path / "config.json").write_text(json.dumps(SMALL | sizes | {"num_hidden_layers": 1024}))
    main(["--model", str(tmp_path), "--pattern", "none", "--gpu", "10000"])
    quarter = rows_of(capsys.readouterr().out)
    both = 2 * SMALL["vocab_size"] * 4096 * 2 / GB  # embedding and output projection
    fitting = [key for key, cells in rows.items() if cells[0] != "does"]  # ... not fit
    assert len(fitting) >= 3
    for key in fitting:
        layers, of_a_quarter = (float(plan[key][1]) - both for plan in (rows, quarter))
        assert layers == pytest.approx(4 * of_a_quarter, abs=0.05)


@pytest.mark.usefixtures("unhooked")
def test_a_model_whose_every_size_is_the_largest_does_not_fit(tmp_path, capsys):
    wide = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 2**30)
    longest = {"max_position_embeddings": 2**31 - 1}
    raw = SMALL | LARGE["heads"] | wide | longest | {"head_dim": 4096}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    start = time.process_time()
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--pattern", "none"])
    assert time.process_time() - start < 2
    assert capsys.readouterr().err.startswith("error: nothing fits a100-80g at any length")


def test_a_config_file_and_its_folder_are_the_same(printed, model, capsys):
    text = printed()
    main(["--model", str(model / "config.json")])
    assert capsys.readouterr().out == text


@pytest.mark.slow
def test_the_demo_model_is_planned_without_flags(capsys):
    main([])
    assert "8 of 16 KV heads streaming" in capsys.readouterr().out


def test_a_context_is_answered_with_the_setting_of_least_loss(printed):
    rows = rows_of(printed())
    longest = int(rows["duo", "model", "model"][0].strip("*").replace(",", ""))
    answer = printed("--context", str(longest)).splitlines()[-1]
    assert answer.startswith(
        f"{longest:,} tokens: duo caches, weights model, KV model is what fits"
    )
    answer = printed("--context", str(longest + 1)).splitlines()[-1]
    assert answer.startswith(
        f"{longest + 1:,} tokens: duo caches, weights model, KV int8 is what fits"
    )
    assert printed("--context", "2000000000").splitlines()[-1] == (
        "2,000,000,000 tokens: no setting fits"
    )


def test_decode_floors_are_compared_at_one_context(printed):
    rows = rows_of(printed("--context", "2000000"))
    floors = {key: cells[-1] for key, cells in rows.items()}
    assert float(floors["duo", "model", "model"]) > float(floors["duo", "model", "int4"])
    assert float(floors["full", "int4", "int4"]) > float(floors["duo", "int4", "int4"])
    expected = estimate(
        dataclasses.replace(WORKLOAD, batch_size=1), Setting(duo=False, kv="int4")
    ).decode_floor(2_000_000, 2039e9)
    assert float(floors["full", "model", "int4"]) == pytest.approx(1e3 * expected, abs=0.006)
    assert "-" in rows_of(printed("--context", "100000000"))["full", "model", "model"]


def test_contexts_beyond_the_models_range_are_marked(printed):
    text = printed("--gpu", "5")
    assert "* longer than the 500,000 tokens that the model was made for" in text
    marked = {key: cells[0].endswith("*") for key, cells in rows_of(text).items()}
    assert marked["duo", "int4", "int2"]
    assert not marked["full", "model", "model"]


def test_a_row_that_cannot_fit_says_so_beside_others_that_do(printed):
    rows = rows_of(printed("--gpu", "2.9"))
    assert rows["full", "model", "model"] == ["does", "not", "fit"]
    assert rows["duo", "int4", "int4"] != ["does", "not", "fit"]


def test_a_format_that_the_model_cannot_have_is_a_row_or_an_error(tmp_path, capsys):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL | {"head_dim": 100}))
    main(["--model", str(folder), "--pattern", "none"])
    rows = rows_of(capsys.readouterr().out)
    assert rows["full", "model", "int4"] == "not possible with this model's sizes".split()
    assert float(rows["full", "model", "int8"][1]) > 0
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--pattern", "none", "--kv", "int4"])
    assert capsys.readouterr().err == (
        "error: KV format int4 needs a head_dim that is a multiple of 8, not 100\n"
    )


REFUSED = {
    "unknown GPU": (("--gpu", "tpu"), "unknown GPU 'tpu': known are a100-40g, a100-80g, "),
    "a digit of another script": (("--gpu", "\u0661"), "unknown GPU '\u0661'"),
    "no file": (("--png", ""), ". cannot be written: it is a folder"),
    "no memory": (("--gpu", "0"), "unknown GPU '0'"),
    "no such sparsity": (("--sparsity", "1.5"), "sparsity 1.5 is not a number from 0 to 1"),
    "no such pattern": (("--pattern", "nowhere"), "full_attention_heads.tsv does not exist"),
    "no such format": (("--kv", "int3"), "int3"),
    "nothing fits": (("--gpu", "1"), "nothing fits a GPU of 1 GB at any length: "),
    "batch": (("--batch", "0"), "batch 0 is not a whole number from 1"),
    "chunk": (("--chunk", "-1"), "chunk -1 is not a whole number from 1"),
    "context": (("--context", "0"), "context 0 is not a whole number from 1"),
    "no folder": (("--png", "nowhere/plan.png"), "its folder does not exist"),
    "asked for": (
        ("--gpu", "2", "--weights", "int8", "--kv", "int8"),
        "nothing fits a GPU of 2 GB at any length: duo caches, weights int8, KV int8 take 2.5",
    ),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_settings_get_one_line(flags, message, model, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--model", str(model), *flags])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_pattern_of_another_model_is_refused(model, tmp_path, capsys):
    other = Pattern(gates=np.ones((3, 8)), sink_size=1, recent_size=1)
    save_pattern(other, tmp_path / "other")
    with pytest.raises(SystemExit):
        main(["--model", str(model), "--pattern", str(tmp_path / "other")])
    error = capsys.readouterr().err
    assert error.startswith("error: pattern has 3 layers x 8 KV heads, the model has 2 x 8;")


def test_a_model_without_pattern_is_refused_as_it_is_when_served(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path)])
    assert "has no pattern of its own" in capsys.readouterr().err


def test_gpus_are_those_that_programs_are_compiled_for():
    for name, target in (("a100-80g", "a100"), ("h200", "h200")):
        gpu, described = gpus.find(name), aot.description(target)
        assert gpu.target == target
        assert gpu.memory == int(re.search(r"device_memory_size: (\d+)", described)[1])
        bandwidth = int(re.search(r"memory_bandwidth: (\d+)", described)[1])
        assert gpu.bandwidth == pytest.approx(bandwidth, rel=1e-3)
    assert gpus.find("A100-80g").budget == pytest.approx(83e9, rel=1e-3)
    assert gpus.find("24").memory == gpus.find("24GB").memory == 24_000_000_000


# The picture.


@pytest.mark.slow
@pytest.mark.usefixtures("unhooked")
def test_a_picture_is_written_when_it_is_complete(printed, tmp_path):
    file = tmp_path / "plan.png"
    assert f"written: {file}" in printed("--png", str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
    pixels = image.imread(file)
    assert pixels.shape[1] > pixels.shape[0] > 500
    other = tmp_path / "other.png"
    printed("--png", str(other), "--chunk", "32000")
    assert other.read_bytes() != file.read_bytes()


def test_a_picture_that_cannot_be_written_is_one_line(model, tmp_path, capsys):
    (tmp_path / "plan.png").mkdir()
    with pytest.raises(SystemExit):
        main(["--model", str(model), "--png", str(tmp_path / "plan.png")])
    assert "plan.png cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


# The documentation.


@pytest.mark.slow
@pytest.mark.usefixtures("unhooked")
def test_the_pages_example_prints_what_it_says(tmp_path, monkeypatch, capsys):
    if not PUBLISHED.is_dir():
        pytest.skip("the published patterns are not here")
    text = (ROOT / "docs/planner.md").read_text(encoding="utf-8")
    example = text.split("<!-- plan example -->\n```\n$ ")[1].split("```\n<!-- end -->")[0]
    command, printed = example.split("\n", 1)
    python, minus_m, module, *args = shlex.split(command)
    assert (python, minus_m, module) == ("python", "-m", "duo_jax.plan")
    folder = tmp_path / "Llama-3-8B"
    folder.mkdir()
    raw = SMALL | {"num_hidden_layers": 32, "max_position_embeddings": 4_194_304}
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copytree(next(PUBLISHED.iterdir()), folder / "pattern")
    monkeypatch.chdir(tmp_path)
    main(args)
    assert capsys.readouterr().out == printed

"""The frontier of head split, cache format and eviction: what is measured, and what is said."""

import ast
import json
import shutil

import numpy as np
import pytest

import duo_jax
from duo_jax.evaluate import __main__ as command
from duo_jax.evaluate.compare import served
from duo_jax.evaluate.frontier import report, search
from duo_jax.evaluate.frontier.search import Point
from duo_jax.evaluate.frontier.settings import FrontierConfig, Setting

pytestmark = pytest.mark.usefixtures("little_text")
FLAGS = ["--length", "256", "--samples", "2", "--batch", "2", "--num-passkeys", "2"]
FLAGS += ["--passkey-words", "4", "--sparsities", "0.5", "--kv-formats", "int8", "--keeps", "0.5"]
FLAGS += ["--sink", "2", "--recent", "20", "--keep-by", "snapkv"]
EVERY = [(s, kv, k) for s in (0.0, 0.5) for kv in ("model", "int8") for k in (1.0, 0.5)]
FEW = [EVERY[0], EVERY[1], EVERY[2], EVERY[4]]  # nothing changed, or one thing


def run(folder, workdir, *more: str, combinations=FEW) -> dict:
    """Run the command, but have it measure these combinations alone."""
    settings = [Setting(sparsity=s, kv=kv, keep=keep) for s, kv, keep in combinations]
    words = ["frontier", "--model", str(folder), "--workdir", str(workdir), *FLAGS, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrontierConfig, "settings", lambda _: settings)
        command.main(words)
    return json.loads((workdir / "frontier.json").read_text())


@pytest.fixture(
    scope="module", params=[FEW, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["few", "every"]
)
def combinations(request):
    return request.param


@pytest.fixture(scope="module")
def finished(combinations, folder, tmp_path_factory):
    """Return work folder and result of a whole run."""
    workdir = tmp_path_factory.mktemp("runs") / "frontier"
    return workdir, run(folder, workdir, combinations=combinations)


def point(share, *nll, **setting):
    nll = np.array(nll)
    return Point(setting=Setting(**setting), share=share, nll=nll, exact=np.exp(-nll))


def test_all_combinations_are_settings():
    flags = FrontierConfig(sparsities=(0.5,), kv_formats=("int8",), keeps=(0.5,))
    assert [(each.sparsity, each.kv, each.keep) for each in flags.settings()] == EVERY


@pytest.mark.slow
def test_every_setting_is_measured_or_said_to_be_worse(finished, combinations):
    _, result = finished
    found = {(row["sparsity"], row["kv"], row["keep"]) for row in result["rows"]}
    found |= {(row["sparsity"], row["kv"], row["keep"]) for row in result["skipped"]}
    assert found == set(combinations)


@pytest.mark.slow
def test_bytes_are_measured_and_each_axis_saves_some(finished):
    _, result = finished
    cache_bytes = {
        Setting(sparsity=row["sparsity"], kv=row["kv"], keep=row["keep"]).name: row["cache_bytes"]
        for row in result["rows"]
    }
    full = cache_bytes["full caches"]
    # One layer of 4 heads, keys and values of 8 channels, in float32; the 3 tokens after the last
    # answer are not read.
    assert full == 253 * 4 * 2 * 8 * 4
    for name in ("50% streaming", "int8", "50% of tokens"):
        assert cache_bytes[name] < 0.85 * full
    for name, size in cache_bytes.items():
        parts = [cache_bytes[part] for part in name.split(", ") if part in cache_bytes]
        assert size <= min(parts)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_it_has(
    finished, combinations, folder, tmp_path, monkeypatch
):
    workdir, result = finished
    shutil.copytree(workdir, tmp_path / "copy")
    lines = (workdir / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "copy/rows.jsonl").write_text("".join(lines[:-1]))
    calls = []
    original = served.predict
    monkeypatch.setattr(
        served, "predict", lambda *args, **sizes: calls.append(args) or original(*args, **sizes)
    )
    again = run(folder, tmp_path / "copy", combinations=combinations)
    assert again["rows"] == result["rows"]
    assert len(calls) == 2  # the row that was lost, and full caches, which it is compared with


@pytest.mark.slow
def test_rows_belong_to_the_way_of_eviction(finished, folder, capsys):
    workdir, _ = finished
    with pytest.raises(SystemExit):
        run(folder, workdir, "--keep-by", "kvzip")
    assert "keep_by was 'snapkv', is 'kvzip'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_line_to_paste_loads_the_setting(finished):
    workdir, result = finished
    text = (workdir / "frontier.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("    duo_jax.load("))
    call = ast.parse(line.strip(), mode="eval").body
    assert isinstance(call, ast.Call)
    arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    model = duo_jax.load(ast.literal_eval(call.args[0]), **arguments)
    assert model.runtime.kv_format == arguments.get("kv", "model")
    assert result["model"] == ast.literal_eval(call.args[0])
    assert (workdir / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_one_text_shows_no_setting_to_be_worse():
    """Its error is not known."""
    points = [point(1.0, 0.1), point(0.5, 1.0, sparsity=0.5), point(0.2, 0.1, kv="int4")]
    assert search.why_skip(Setting(sparsity=0.75, kv="int8"), 0.3, points) is None
    result = {"budgets": [0.6], "model": "M", "pattern": "P", "keep_by": "kvzip", "load": {}}
    text = report.to_markdown(result, points, [])
    assert "nan" not in text
    assert "±" not in text


@pytest.mark.slow
def test_the_tables_can_be_written_again_from_the_file(finished):
    workdir, result = finished
    text = report.to_markdown(result, *search.stored(result))
    assert text + "\n" == (workdir / "frontier.md").read_text()


def test_a_stored_result_holds_points_and_what_was_skipped():
    full = {"sparsity": 0.0, "kv": "model", "keep": 1.0}
    split = full | {"sparsity": 0.5}
    rows = [
        full | {"cache_bytes": 100, "nll": [0.1, 0.2], "exact": [1.0, 1.0]},
        full | {"cache_bytes": 200, "nll": [0.3], "exact": [1.0]},  # another task
        split | {"cache_bytes": 50, "nll": [0.4, 0.5], "exact": [1.0, 0.0]},
        split | {"cache_bytes": 120, "nll": [0.6], "exact": [0.0]},
    ]
    skipped = [split | {"keep": 0.5, "share": 0.3, "reason": "int4 is better than 50% streaming"}]
    points, left_out = search.stored({"rows": rows, "skipped": skipped})
    assert [point.setting.name for point in points] == ["full caches", "50% streaming"]
    assert [point.share for point in points] == [1.0, 0.6]
    assert points[1].nll.tolist() == [0.4, 0.5, 0.6]
    assert points[1].exact.tolist() == [1.0, 0.0, 0.0]
    assert [(why.setting.keep, why.reason) for why in left_out] == [(0.5, skipped[0]["reason"])]


@pytest.mark.slow
def test_sizes_are_those_that_were_asked_for(finished):
    _, result = finished
    assert (result["sink"], result["recent"]) == (2, 20)
    assert result["load"] == {"sink_size": 2, "recent_size": 20}


def test_a_setting_that_can_only_be_worse_is_not_measured():
    half, eighth = point(0.5, 1.0, 1.1, sparsity=0.5), point(0.2, 0.5, 0.6, kv="int4")
    points = [point(1.0, 0.1, 0.1), half, eighth]
    skipped = search.why_skip(Setting(sparsity=0.75, kv="int8"), 0.3, points)
    assert skipped is not None
    assert skipped.reason == "int4 is better than 50% streaming"
    assert search.why_skip(Setting(sparsity=0.75, kv="int8"), 0.1, points) is None  # fewer bytes
    assert search.why_skip(Setting(kv="int8", keep=0.5), 0.3, points) is None  # finer than neither
    unsure = [point(1.0, 0.1, 0.1), half, point(0.2, 0.0, 2.1, kv="int4")]
    assert search.why_skip(Setting(sparsity=0.75), 0.3, unsure) is None


def test_single_axes_come_first_then_the_smallest():
    settings = [Setting(sparsity=0.5, kv="int8"), Setting(sparsity=0.5, kv="int4"), Setting()]
    settings += [Setting(kv="int4"), Setting(keep=0.5)]
    shares = dict(zip(settings, (0.3, 0.2, 1.0, 0.4, 0.5), strict=True))
    assert [setting.name for setting in search.in_order(settings, shares)] == [
        "full caches",
        "int4",
        "50% of tokens",
        "50% streaming, int4",
        "50% streaming, int8",
    ]


def test_the_best_of_a_budget_and_of_each_axis():
    points = [
        point(1.0, 0.1),
        point(0.5, 0.2, sparsity=0.5),
        point(0.3, 0.9, kv="int4"),
        point(0.25, 0.3, sparsity=0.5, kv="int8"),
        point(0.2, 0.8, keep=0.2),
    ]
    assert [p.share for p in search.frontier(points)] == [0.2, 0.25, 0.5, 1.0]
    assert search.best(points, 0.4).setting.name == "50% streaming, int8"
    assert search.best(points, 0.1) is None
    names = [p.setting.name for p in search.singles(points, 0.4)]
    assert names == ["int4", "20% of tokens"]  # the split alone does not fit
    few = [point for point in points if len(point.setting.axes) == 2]
    result = {"budgets": [0.4, 0.1], "model": "M", "pattern": "P", "keep_by": "kvzip"}
    result["load"] = {"sink_size": 4, "weights": "int8"}
    assert "No axis alone was measured with so few bytes." in report.to_markdown(result, few, [])
    text = report.to_markdown(result, points, [])
    assert (
        'duo_jax.load("M", pattern="P", sparsity=0.5, kv="int8", sink_size=4, weights="int8")'
        in text
    )
    assert "minus int4 (30.0%): NLL -0.600" in text
    assert "nothing fits; the smallest setting that was measured is 20% of tokens, 20.0%" in text


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--kv", "int8"], "--kv-formats and --keeps are what is measured"),
        (["--keep", "0.5"], "--kv-formats and --keeps are what is measured"),
        (["--sparsity", "0.5"], "--sparsities say how many heads stream"),
        (["--keeps", "0.5", "0.5"], "--keeps names one twice"),
        (["--pattern", "none"], "without a pattern no head streams"),
        (["--length", "9999"], "beyond the model's range"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(flags, reason, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run(folder, tmp_path, *flags)
    assert error.value.code == 2
    assert reason in capsys.readouterr().err

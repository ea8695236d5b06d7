"""The comparison command: equal bytes, resumed row by row, the same numbers twice."""

import json
import pathlib

import numpy as np
import pytest

from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.data.documents import load_documents
from duo_jax.data.passkey_templates import PasskeyTemplates
from duo_jax.evaluate.compare import command as compare_command
from duo_jax.evaluate.compare import methods as compare_methods
from duo_jax.evaluate.compare.plot import png
from duo_jax.evaluate.compare.points import differences, points
from duo_jax.evaluate.compare.report import to_markdown
from duo_jax.evaluate.compare.tasks import Task, make_task
from duo_jax.heads.pattern import Pattern, save_pattern
from tests import models

pytestmark = pytest.mark.usefixtures("little_text")
DATA = PasskeyTemplates(num_passkeys=2, passkey_words=2)
FLAGS = (
    "--num-passkeys 2 --passkey-words 2 --samples 3 --batch 2 --length 320 --random-seeds 2 "
    "--profile-samples 1 --sink 2 --recent 6"
).split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a tiny random model with a tokenizer and a pattern of its own."""
    raw = models.llama(vocab_size=600, max_position_embeddings=512, num_hidden_layers=1)
    folder = models.write_hf(tmp_path_factory.mktemp("models") / "tiny", raw)
    gates = np.array([[0.1, 0.9]])
    save_pattern(Pattern(gates=gates, sink_size=4, recent_size=12), folder / "pattern")
    return models.write_tokenizer(folder)


def run(model: pathlib.Path, workdir: pathlib.Path, *more: str) -> dict:
    compare_command.main(["--model", str(model), "--workdir", str(workdir), *FLAGS, *more])
    return json.loads((workdir / "compare.json").read_text())


SOME = "duo,random heads,H2O"  # heads that stream, and tokens that are evicted


# By default test_eviction.py alone compares methods that have the whole budget with full caches.
@pytest.fixture(
    scope="module",
    params=[(SOME, "0.6"), pytest.param(("", "0.6,1.0"), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def finished(request, model, tmp_path_factory):
    """Return work folder and result of a whole comparison, what was predicted beside each row."""
    workdir, predicted = tmp_path_factory.mktemp("runs") / "compare", []
    original = Task.score

    def score(task, rows):
        predicted.append([row[: tail.size] for row, tail in zip(rows, task.tails, strict=True)])
        return original(task, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "score", score)
        names, budgets = request.param
        methods = ["--methods", names] if names else []
        result = run(model, workdir, "--budgets", budgets, "--tasks", "passkeys", *methods)
    measured = [row for row in result["rows"] if "reason" not in row]
    for row, rows in zip(measured, predicted, strict=True):
        row["predicted"] = np.concatenate(rows)
    return workdir, result


def rows_of(result, **wanted):
    return [row for row in result["rows"] if all(row[k] == v for k, v in wanted.items())]


def compressed(result):
    return [row for row in rows_of(result, budget=0.6) if "reason" not in row]


def test_all_methods_stay_within_the_budget_and_use_it(finished):
    _, result = finished
    methods = {row["method"] for row in result["rows"]}
    assert methods >= {"full", *SOME.split(",")}
    assert len(methods) in (4, 14)
    (full,) = rows_of(result, method="full")
    assert full["cache_bytes"] == full["full_bytes"]
    for row in rows_of(result, budget=0.6):
        if row["method"] == "CHAI":  # one head's keys and the values are 75% here
            assert "take more" in row["reason"]
            continue
        share = row["cache_bytes"] / row["full_bytes"]
        # A retrieval head is half of the bytes here, a chunk of ShadowKV under 3%; a token of every
        # head is under 1%.
        coarse = {"duo": 0.5, "profile heads": 0.5, "random heads": 0.5, "ShadowKV": 0.57}
        least = coarse.get(row["method"], 0.59)
        assert least < share <= 0.6, row["method"]
        assert row["full_bytes"] == full["full_bytes"]


def test_with_the_whole_budget_every_method_is_the_full_cache(finished):
    _, result = finished
    (full,) = rows_of(result, method="full")
    for row in rows_of(result, budget=1.0):
        assert row["cache_bytes"] == full["cache_bytes"], row["method"]
        np.testing.assert_array_equal(row["predicted"], full["predicted"], row["method"])
    for row in compressed(result):
        assert (row["predicted"] != full["predicted"]).any(), row["method"]


def test_likelihood_and_divergence_are_measured_for_every_method(finished):
    workdir, result = finished
    (full,) = rows_of(result, method="full")
    assert full["kl"] is None
    assert len(full["nll"]) == 3
    for row in rows_of(result, budget=1.0):
        np.testing.assert_allclose(row["nll"], full["nll"], rtol=1e-4, err_msg=row["method"])
        if row["method"] != "full":
            np.testing.assert_allclose(row["kl"], 0, atol=1e-5, err_msg=row["method"])
    for row in compressed(result):
        assert min(row["kl"]) > 1e-4, row["method"]
        assert row["nll"] != full["nll"], row["method"]
    table = (workdir / "compare.md").read_text()
    assert "| answer NLL, nats per token | 60% | 100% |" in table
    assert "| KL from full caches, nats per token | 60% | 100% |" in table
    assert "- duo minus full, nats:" in table


def test_a_tables_scores_are_those_that_were_measured(finished):
    """Results of earlier versions have neither likelihood nor divergence."""
    _, result = finished
    older = [{k: v for k, v in row.items() if k not in ("nll", "kl")} for row in result["rows"]]
    table = to_markdown(result | {"rows": older})
    assert "| exact retrieval |" in table
    assert "NLL" not in table
    assert "KL" not in table
    assert png(result) != png(result | {"rows": older})


def test_the_result_says_what_was_measured_and_with_what(finished):
    workdir, result = finished
    assert {"hardware", "jax", "dtype", "prefill_mode", "prefill_chunk", "seed"} <= result.keys()
    assert (result["sink"], result["recent"]) == (2, 6)
    (duo,) = rows_of(result, method="duo", budget=0.6)
    assert duo["setting"] == {"retrieval_heads": [1], "sink": 2, "recent": 6}
    for streaming in rows_of(result, method="all-streaming", budget=0.6):
        assert streaming["setting"]["sink"] == 4
        assert streaming["setting"]["retrieval_heads"] == [0]
    (h2o,) = rows_of(result, method="H2O", budget=0.6)
    assert h2o["setting"]["recent_share"] == 0.5
    assert len(rows_of(result, method="random heads", budget=0.6)) == 2
    table = (workdir / "compare.md").read_text()
    assert "| duo |" in table
    assert "duo minus random heads" in table
    for shadow in rows_of(result, method="ShadowKV", budget=0.6):
        on_host = shadow["host_bytes"] / shadow["full_bytes"]
        assert f"- ShadowKV: bytes on the device; the host holds {on_host:.1%} of" in table
    assert (workdir / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_and_repeats_no_row(
    finished, model, tmp_path, monkeypatch
):
    _, whole = finished
    measured, count = [], 0
    original = compare_methods.measure

    def measure(known, task, method, budget, **options):
        measured.append((task.name, method, budget, options["seed"]))
        if len(measured) == count:
            raise KeyboardInterrupt
        return original(known, task, method, budget, **options)

    monkeypatch.setattr(compare_methods, "measure", measure)
    flags = ["--budgets", "0.6", "--tasks", "passkeys", "--methods", "duo,random heads,H2O"]
    count = 4
    with pytest.raises(SystemExit):
        run(model, tmp_path / "run", *flags)
    stopped_at = measured.pop()
    count = 0
    result = run(model, tmp_path / "run", *flags)
    assert stopped_at in measured
    assert len(set(measured)) == len(measured) == len(result["rows"]) == 5
    for row in result["rows"]:
        place = {name: row[name] for name in ("method", "budget", "draw")}
        (same,) = rows_of(whole, **place)
        assert row | {"predicted": None} == same | {"predicted": None}


def test_another_configuration_is_refused_by_name(finished, model, capsys):
    workdir, _ = finished
    with pytest.raises(SystemExit) as exit_:
        run(model, workdir, "--budgets", "0.6", "--tasks", "passkeys", "--seed", "1")
    assert exit_.value.code == 2
    assert "seed was 0, is 1" in capsys.readouterr().err


@pytest.mark.slow
def test_budgets_and_methods_may_be_added_to_a_finished_run(finished, model):
    workdir, whole = finished
    result = run(model, workdir, "--tasks", "passkeys", "--methods", "duo", "--budgets", "0.8")
    assert [row["method"] for row in result["rows"]] == ["full", "duo"]
    (full,) = rows_of(whole, method="full")
    assert result["rows"][0].items() <= full.items()
    assert result["rows"][1]["setting"]["retrieval_heads"] == [1]
    assert rows_of(whole, budget=0.8) == []


def test_what_does_not_fit_is_said(finished, model):
    workdir, _ = finished
    flags = ["--tasks", "passkeys", "--methods", "duo,SnapKV", "--budgets", "0.01"]
    _, *rows = run(model, workdir, *flags)["rows"]
    assert [row["method"] for row in rows] == ["duo", "SnapKV"]
    assert all("take" in row["reason"] for row in rows)
    assert "does not fit" in (workdir / "compare.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budgets", "0.5,1.5"], "budgets 1.5 is not a number above 0, at most 1"),
        (["--budgets=0.5,0.5"], "--budgets must name one or more, each once"),
        (["--sparsity", "0.5"], "--budgets decide how many heads stream"),
        (["--pattern", "none"], "nothing to compare without a pattern"),
        (["--length", "5000"], "length 5,000 is beyond the model's range of 512"),
        (["--kv", "int8"], "--kv model"),
        (["--methods", "duo,magic"], "magic"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_unusable_input_is_one_line_and_exit_code_2(model, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        run(model, tmp_path / "run", *flags)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_needle_compresses_the_question_and_passkeys_come_after(model):
    tokenizer = load_tokenizer(model)
    documents = load_documents(())
    sizes = {"samples": 2, "length": 300, "seed": 0}
    needle = make_task("needle", DATA, tokenizer, documents, **sizes)
    passkeys = make_task("passkeys", DATA, tokenizer, documents, **sizes)
    ask = DATA.question.format(name="first")
    for text, tail in zip(needle.texts, needle.tails, strict=True):
        assert tokenizer.decode(text).endswith(ask)
        assert tokenizer.decode(text).count("passkey to the vault:") == 1
        assert tail.size == needle.answers[0][0][1]
    for text, tail, answers in zip(passkeys.texts, passkeys.tails, passkeys.answers, strict=True):
        assert "What is the" not in tokenizer.decode(text)[-len(ask) :]
        assert tokenizer.decode(tail).count("What is the") == 2
        assert answers[-1][1] == tail.size


def test_a_passkey_counts_when_every_token_is_right(model):
    documents = load_documents(())
    sizes = {"samples": 1, "length": 300, "seed": 0}
    task = make_task("passkeys", DATA, load_tokenizer(model), documents, **sizes)
    right = task.score(task.tails)
    assert right.exact.tolist() == right.tokens.tolist() == [1.0]
    wrong = task.tails[0].copy()
    wrong[task.answers[0][0][0]] += 1
    assert task.score([wrong]).exact.tolist() == [0.5]
    assert 0.5 < task.score([wrong]).tokens[0] < 1


def test_differences_are_paired_by_text():
    def row(method, exact, budget=0.5, draw=0):
        shared = {"task": "needle", "cache_bytes": 1, "full_bytes": 2}
        return {"method": method, "budget": budget, "draw": draw, "exact": exact} | shared

    rows = [row("full", [1.0, 1.0], 1.0), row("duo", [1.0, 0.5])]
    rows += [row("random heads", [0.5, 0.0]), row("random heads", [0.0, 0.5], draw=1)]
    found = points({"rows": rows}, "needle")
    assert list(differences(found, "duo", "full")) == [(0.5, -0.25, 0.25)]
    ((budget, change, error),) = differences(found, "duo", "random heads")
    assert (budget, change) == (0.5, 0.5)
    assert error == pytest.approx(0.25)
    drawn = found[-1]
    assert (drawn.mean, drawn.spread) == (0.25, (0.25, 0.25))
    assert drawn.share == 0.5

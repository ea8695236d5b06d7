"""Passkeys by length and depth: the command."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import duo_jax
from duo_jax import serve
from duo_jax.cache import init_cache
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkeys import PasskeyConfig, PasskeySampler
from duo_jax.evaluate import __main__ as command
from duo_jax.evaluate.passkeys import retrieval

pytestmark = pytest.mark.usefixtures("little_text")
TASK = ["--num-passkeys", "3", "--passkey-words", "4"]
FLAGS = ["--lengths", "256", "--samples", "3", "--batch", "2", "--kv", "bf16", *TASK]


def run(folder, workdir, *more: str) -> dict:
    command.main(["passkeys", "--model", str(folder), "--workdir", str(workdir), *FLAGS, *more])
    return json.loads((workdir / "passkeys.json").read_text())


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Return work folder and result of a whole evaluation."""
    workdir = tmp_path_factory.mktemp("runs") / "passkeys"
    return workdir, run(folder, workdir)


def test_rows_are_those_of_served_retrieval(finished, folder):
    workdir, result = finished
    assert len(result["rows"]) == 2 * 3 * 3  # caches, texts, passkeys
    assert result["kv"] == "bf16"
    assert (workdir / "passkeys.png").read_bytes().startswith(b"\x89PNG")
    assert {row["haystack"] for row in result["rows"]} == {"held-out text"}
    model = duo_jax.load(folder, kv="bf16")
    data = PasskeyConfig(num_passkeys=3, passkey_words=4, min_length=1, max_length=256)
    _, held_out = split_held_out(load_documents(()))
    sampler = PasskeySampler(data, model.tokenizer, held_out, seed=0, stream=2)
    sample = sampler.sample(1, length=256)
    forced, _ = retrieval.read(model.runtime, [sample, sample])
    found = retrieval.judge(model.runtime, [sample, sample], forced)
    rows = [row for row in result["rows"] if (row["caches"], row["sample"]) == ("duo", 1)]
    assert [row["exact"] for row in rows] == found.exact[0].tolist()
    assert [row["recall"] for row in rows] == found.tokens[0].tolist()
    assert [row["nll"] for row in rows] == found.nll[0].tolist()
    for row, depth in zip(rows, sample.depths, strict=True):
        assert row["depth"] == pytest.approx(depth, abs=0.05)


def test_the_reference_has_full_caches_in_the_models_own_format(finished):
    _, result = finished
    sizes = {row["caches"]: row["cache_bytes"] for row in result["rows"]}
    assert sizes["duo"] < sizes["full"] / 2  # fewer heads, in bf16 instead of float32


def test_a_pattern_that_is_another_now_is_another_run(folder, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(folder, tmp_path / "model")
    monkeypatch.setattr(retrieval, "read", None)
    with pytest.raises(TypeError):  # the run has begun
        run(model, tmp_path / "run")
    file = model / "pattern/config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"recent_size": settings["recent_size"] - 1}))
    with pytest.raises(SystemExit):
        run(model, tmp_path / "run")
    assert "another configuration (split.recent_size was" in capsys.readouterr().err


@pytest.mark.slow
def test_divergence_is_that_of_the_distributions_on_the_answers(finished, folder):
    """Against logits of the whole text, read at once with every head's own mask."""
    _, result = finished
    data = PasskeyConfig(num_passkeys=3, passkey_words=4, min_length=1, max_length=256)
    full, duo = duo_jax.load(folder, pattern="none"), duo_jax.load(folder, kv="bf16")
    _, held_out = split_held_out(load_documents(()))
    sample = PasskeySampler(data, duo.tokenizer, held_out, seed=0, stream=2).sample(1, length=256)
    log_r, log_p = (log_probabilities(model, sample.tokens) for model in (full, duo))
    rows = {
        caches: [r for r in result["rows"] if (r["caches"], r["sample"]) == (caches, 1)]
        for caches in ("full", "duo")
    }
    for i, (start, stop) in enumerate(sample.answers):
        places, tokens = np.arange(start - 1, stop - 1), sample.tokens[start:stop]
        for caches, log in (("full", log_r), ("duo", log_p)):
            expected = -log[places, tokens].mean()
            assert rows[caches][i]["nll"] == pytest.approx(expected, abs=0.02)  # caches of bf16
        kl = (np.exp(log_r) * (log_r - log_p)).sum(axis=-1)[places].mean()
        assert rows["duo"][i]["kl"] == pytest.approx(kl, abs=0.02)
        assert kl > 0.1
        assert "kl" not in rows["full"][i]


def log_probabilities(model, tokens) -> np.ndarray:
    """Return those of every next token."""
    cache = init_cache(model.config, batch_size=1, max_len=tokens.size)
    read = jax.jit(serve.hidden_states, static_argnums=0)
    sizes = jnp.array([tokens.size], jnp.int32)
    x, _ = read(model.config, model.params, cache, jnp.asarray(tokens[None]), sizes)
    logits = np.asarray(serve.logits(model.config, model.params, x)[0], np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_the_table_has_likelihood_and_divergence_with_their_errors(finished):
    workdir, result = finished
    texts = {}
    for row in result["rows"]:
        if row["caches"] == "duo":
            texts.setdefault(row["sample"], []).append(row["kl"])
    means = np.mean(list(texts.values()), axis=1)  # passkeys of one text hang together
    kl = f"{means.mean():.3f} ± {2 * means.std(ddof=1) / 3**0.5:.3f}"
    full, duo = (workdir / "passkeys.md").read_text().splitlines()[2:4]
    assert f"| {kl} |" in duo
    assert "| - |" in full


def test_rows_of_an_earlier_version_are_kept_and_said(finished, folder, tmp_path, capsys):
    workdir, expected = finished
    older = tmp_path / "older"
    shutil.copytree(workdir, older)
    lines = [json.loads(line) for line in (older / "rows.jsonl").read_text().splitlines()]
    kept = [{"key": line["key"], "row": line["row"]} for line in lines]
    for line in kept[:2]:
        del line["row"]["nll"], line["row"]["kl"]
    (older / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    result = run(folder, older)
    assert result["rows"][6:] == expected["rows"][6:]
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "rows.jsonl" in line]
    assert "2 rows of an earlier version hold no likelihoods" in line
    assert "remove the file to measure them again" in line
    full = next(line for line in printed.out.splitlines() if "full caches" in line)
    assert "| - | - |" in full


@pytest.mark.slow  # what the words say is tested in test_needle.py and test_passkey_texts.py
def test_passkeys_of_digits(folder, tmp_path):
    flags = "--lengths 400 --no-full --samples 1 --batch 1 --words digits --num-passkeys 2"
    where = ["--model", str(folder), "--workdir", str(tmp_path / "a")]
    command.main(["passkeys", *where, *flags.split()])
    result = json.loads((tmp_path / "a" / "passkeys.json").read_text())
    assert result["task"] == "2 passkeys of a number"
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "pass key is{passkey}. Remember it." in config["data"]["needle"]


@pytest.mark.slow  # test_demo_model.py finds them behind masks, README's examples served
def test_the_demo_finds_its_passkeys_and_not_while_streaming(tmp_path):
    flags = ["--lengths", "512", "--samples", "4", "--batch", "4", "--no-full"]

    def exact(*more: str) -> float:
        workdir = tmp_path / "-".join(more)
        command.main(["passkeys", "--workdir", str(workdir), *flags, *more])
        rows = json.loads((workdir / "passkeys.json").read_text())["rows"]
        return float(np.mean([row["exact"] for row in rows]))

    assert exact("--sparsity", "0.5") > 0.85
    assert exact("--sparsity", "1") < 0.2


@pytest.mark.slow
def test_each_length_says_which_text_it_was_read_from(folder, tmp_path, capsys, monkeypatch):
    """The held-out tenth is long enough for the shorter length only."""
    text = tmp_path / "text.txt"
    text.write_text("passkeys hidden in it\n" * 250)
    titles = []
    draw = Figure.suptitle
    monkeypatch.setattr(
        Figure, "suptitle", lambda self, t, **more: titles.append(t) or draw(self, t, **more)
    )
    flags = ["--lengths", "256", "400", "--no-full", "--samples", "1"]
    result = run(folder, tmp_path / "a", "--text", str(text), *flags)
    haystacks = {row["length"]: row["haystack"] for row in result["rows"]}
    assert haystacks == {256: "held-out text", 400: "all text"}
    assert result["haystacks"] == list(haystacks.values())
    words = "held-out text, 256 tokens; all text, 400 tokens"
    assert f"Haystack: {words}." in capsys.readouterr().out
    assert f"Haystack: {words}." in (tmp_path / "a" / "passkeys.md").read_text()
    assert words in titles[0]


def test_a_second_start_measures_nothing(finished, folder, monkeypatch, capsys):
    workdir, expected = finished
    monkeypatch.setattr(retrieval, "read", None)
    assert run(folder, workdir)["rows"] == expected["rows"]
    printed = capsys.readouterr().out
    assert "| full caches |" in printed
    assert "Haystack: held-out text, 256 tokens." in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lengths", "600"], "room for 512"),
        (["--lengths", "20"], "no room for 3 passkeys"),
        (["--samples", "0"], "samples 0 is not a whole number"),
        (["--num-passkeys", "99"], "num_passkeys 99 is not in 1 to 20"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        run(folder, tmp_path / "a", *flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert words in error

"""Perplexity by position: the command, its texts, and what it reads."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import duo_jax
from duo_jax import serve
from duo_jax.cache import init_cache
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.evaluate import __main__ as command
from duo_jax.evaluate.perplexity import reading
from duo_jax.evaluate.perplexity.command import bucket_bounds
from duo_jax.evaluate.perplexity.texts import stretches
from duo_jax.heads.pattern import Pattern, save_pattern

pytestmark = pytest.mark.usefixtures("little_text")
LENGTH = 300
FLAGS = ["--length", str(LENGTH), "--samples", "2", "--sparsities", "0.5", "--kv-formats", "int4"]


def run(folder, workdir, *more: str) -> dict:
    command.main(["perplexity", "--model", str(folder), "--workdir", str(workdir), *FLAGS, *more])
    return json.loads((workdir / "perplexity.json").read_text())


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Return work folder and result of a whole evaluation."""
    workdir = tmp_path_factory.mktemp("runs") / "perplexity"
    return workdir, run(folder, workdir)


def decoded(model, tokens) -> np.ndarray:
    """Return minus the log-probabilities of a text that is read token by token."""
    cache = init_cache(model.config, batch_size=1, max_len=tokens.size, kv=model.runtime.kv_format)
    step = jax.jit(serve.decode, static_argnums=0, donate_argnums=2)
    found = []
    for token, following in itertools.pairwise(tokens):
        logits, cache = step(model.config, model.runtime.params, cache, jnp.array([token]))
        found.append(-jax.nn.log_softmax(logits[0])[following])
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv", "sparsity", "chunk"),
    [
        ("int2", 0.5, 64),
        ("model", 0.5, 64),
        ("int4", 0.0, 8192),
        ("int2", 0.5, 128),
    ],
)
def test_chunks_are_read_as_the_caches_would_serve_each_token(folder, chunk, kv, sparsity):
    model = duo_jax.load(folder, sparsity=sparsity, kv=kv, prefill_chunk=chunk)
    tokens = np.random.default_rng(0).integers(600, size=150).astype(np.int32)
    nll, cache_bytes = reading.read(model.runtime, tokens)
    np.testing.assert_allclose(nll, decoded(model, tokens), atol=1e-4)
    assert cache_bytes > 0


@pytest.mark.slow
def test_rows_are_means_by_position(finished, folder):
    _, result = finished
    assert result["bounds"] == [1, 256, 300]
    assert result["text"] == "held-out text"
    settings = list(dict.fromkeys(row["setting"] for row in result["rows"]))
    assert settings == ["full caches", "50% streaming", "full caches, int4 KV"]
    for setting, load in [
        ("full caches", {"pattern": "none"}),
        ("50% streaming", {"sparsity": 0.5}),
        ("full caches, int4 KV", {"pattern": "none", "kv": "int4"}),
    ]:
        model = duo_jax.load(folder, **load)
        rows = [row for row in result["rows"] if row["setting"] == setting]
        assert [row["text"] for row in rows] == [0, 1]
        assert rows[0]["nll"] != rows[1]["nll"]
    # The last one; what is read is compared with what is decoded above.
    _, held_out = split_held_out(load_documents(()))
    text = stretches(model.tokenizer, held_out, length=LENGTH, samples=2)[1]
    nll, _ = reading.read(model.runtime, text)
    assert rows[1]["nll"] == pytest.approx([nll[:255].mean(), nll[255:].mean()], abs=1e-4)
    assert rows[1]["tokens"] == [255, 44]


@pytest.mark.slow
def test_the_table_compares_with_full_caches_text_by_text(finished):
    workdir, result = finished
    nll = {
        setting: np.array([r["nll"][1] for r in result["rows"] if r["setting"] == setting])
        for setting in ("full caches", "50% streaming")
    }
    change = nll["50% streaming"] - nll["full caches"]
    cell = f"{change.mean():+.3f} ± {2 * change.std(ddof=1) / 2**0.5:.3f}"
    table = (workdir / "perplexity.md").read_text()
    _, differences = table.split("| minus full caches |")
    assert f"| {cell} |" in next(x for x in differences.splitlines() if "50% streaming" in x)
    every = np.average(
        [r["nll"] for r in result["rows"] if r["setting"] == "full caches"],
        axis=1,
        weights=[255, 44],
    )
    assert f"| {np.exp(every.mean()):.2f} |" in table.splitlines()[2]
    assert (workdir / "perplexity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_second_start_reads_nothing_and_more_settings_may_follow(
    finished, folder, monkeypatch, capsys
):
    workdir, expected = finished
    with monkeypatch.context() as patched:
        patched.setattr(reading, "read", None)
        assert run(folder, workdir)["rows"] == expected["rows"]
        assert "| full caches, int4 KV |" in capsys.readouterr().out
        with pytest.raises(TypeError):  # a new setting is read
            run(folder, workdir, "--weight-formats", "int8")


@pytest.mark.slow
def test_another_pattern_in_the_same_folder_is_refused(finished, folder, tmp_path, capsys):
    workdir, _ = finished
    other = Pattern(gates=np.array([[0.8, 0.1, 0.2, 0.9]]), sink_size=4, recent_size=12)
    save_pattern(other, tmp_path / "other")
    with pytest.raises(SystemExit):
        run(folder, workdir, "--pattern", str(tmp_path / "other"))
    assert "another configuration" in capsys.readouterr().err


def test_buckets_double():
    assert bucket_bounds(8192) == [1, 256, 512, 1024, 2048, 4096, 8192]
    assert bucket_bounds(256) == [1, 256]
    assert bucket_bounds(3) == [1, 3]


def test_texts_are_of_one_document_where_it_is_long_enough(folder):
    tokenizer = duo_jax.load(folder).tokenizer
    long = " ".join(f"This is word number {i} of it." for i in range(100))
    short = "Some other words, and more of them. " * 3
    documents = [short, long]
    alone = stretches(tokenizer, documents, length=150, samples=3)
    assert all(text.size == 150 for text in alone)
    assert len({text.tobytes() for text in alone}) == 3
    assert not any("other" in tokenizer.decode(text) for text in alone)
    (joined,) = stretches(tokenizer, [short, long[:200], short], length=150, samples=1)
    assert "other" in tokenizer.decode(joined)
    assert "number" in tokenizer.decode(joined)


@pytest.mark.slow
def test_the_demo_is_read_worse_by_streaming_heads_only(tmp_path):
    """Its pattern's retrieval heads are for passkeys; plain text needs few of them."""
    flags = ["--length", "512", "--samples", "4", "--sparsities", "0.5"]
    command.main(["perplexity", "--workdir", str(tmp_path / "a"), *flags])
    rows = json.loads((tmp_path / "a" / "perplexity.json").read_text())["rows"]
    means = {
        setting: np.mean([row["nll"] for row in rows if row["setting"] == setting])
        for setting in ("full caches", "50% streaming")
    }
    assert means["full caches"] < 8
    assert abs(means["50% streaming"] - means["full caches"]) < 0.2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--length", "600"], "not from 2 to the model's range of 512"),
        (["--length", "512", "--samples", "900"], "tokens, 900 texts of 512 are needed"),
        (["--sparsities", "0.5", "0.5"], "--sparsities names one twice"),
        (["--sparsity", "0.5"], "--sparsities say how many heads stream"),
        (["--pattern", "none"], "without a pattern no head streams"),
        (["--sparsities", "--kv-formats", "--no-full"], "there is nothing to measure"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        run(folder, tmp_path / "a", *flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert words in error

"""The benchmark of quantised caches and weights counts what it says, through the real caches."""

import dataclasses
import functools
import json

import numpy as np
import pytest

import duo_jax
from benchmarks import quantised
from benchmarks.quantised import Found, QuantisedFlags
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.evaluate.passkeys import retrieval
from duo_jax.heads.pattern import choose_retrieval_heads, load_pattern

TINY = QuantisedFlags(
    samples=4, length=256, passkeys=4, chunk=104, rows=2, kv=("int4",), weights=("int8",), both=()
)


@pytest.mark.slow
def test_passkeys_count_as_in_training():
    folder = pretrained.resolve("demo")
    pattern = load_pattern(folder / "pattern")
    # All heads stream: so some passkeys are found, those nearby, and others are not.
    model = duo_jax.load("demo", sparsity=1.0, prefill_chunk=TINY.chunk)
    test = quantised.held_out(TINY, model)
    assert test.haystack == "held-out text"
    masked = functools.partial(
        test.scores,
        model.config.architecture,
        pretrained.load_params(folder, dtype=np.float32),
        sink_size=pattern.sink_size,
        recent_size=pattern.recent_size,
    )
    itself = masked(np.ones(pattern.gates.shape, bool))
    by_mask = masked(choose_retrieval_heads(pattern.gates, sparsity=1.0), reference=itself)
    found = quantised.retrieve(model.runtime, test.samples, rows=2)
    np.testing.assert_array_equal(found.exact, by_mask.exact)
    np.testing.assert_array_equal(found.tokens, by_mask.tokens)
    full = duo_jax.load("demo", pattern="none", prefill_chunk=TINY.chunk)
    for rows in (slice(0, 2), slice(2, 4)):
        samples = test.samples[rows]
        reference, _ = retrieval.read(full.runtime, samples)
        forced, _ = retrieval.read(model.runtime, samples)
        served = retrieval.judge(model.runtime, samples, forced, reference=reference)
        np.testing.assert_allclose(served.nll, by_mask.nll[rows], atol=1e-3)
        np.testing.assert_allclose(served.kl, by_mask.kl[rows], atol=1e-3)
    assert by_mask.kl.mean() > 0.1
    assert 0 < found.exact.mean() <= found.tokens.mean() < 1
    assert len(found.logits) == sum(s.tokens.size - s.tail_start for s in test.samples)


@pytest.mark.slow
def test_smallest_run_compares_every_setting_with_the_model_itself(tmp_path, capsys):
    config = dataclasses.replace(TINY, samples=2, out=tmp_path / "some" / "quantised.json")
    quantised.main(config)
    result = json.loads(config.out.read_text())
    assert quantised.to_markdown(result) in capsys.readouterr().out
    assert (result["dtype"], result["sink"], result["recent"]) == ("float32", 16, 96)
    full, own, int4, int8 = result["rows"]
    assert [(row["weights"], row["kv"]) for row in result["rows"]] == [
        ("model", "model"), ("model", "model"), ("model", "int4"), ("int8", "model"),
    ]  # fmt: skip
    assert "change" not in full
    assert (own["change"], own["logits_relative_error"], own["same_choice"]) == (0, 0, 1)
    assert 0 < int8["logits_relative_error"] < int4["logits_relative_error"] < 1
    # 16 channels of 4 bytes; in 4 bits, 8 bytes of codes and 4 of scale and zero.
    assert int4["cache_bytes"] == own["cache_bytes"] * 12 / 64
    assert int8["cache_bytes"] == own["cache_bytes"] < full["cache_bytes"]
    assert full["cache_bytes"] == 4 * 4 * 2 * 64 * 512  # slots, in powers of two
    assert full["exact"] == 1


def test_changes_are_paired_text_by_text():
    def found(exact, logits):
        exact = np.array(exact, np.float64)
        return Found(exact=exact, tokens=exact, logits=np.array(logits, np.float32), cache_bytes=7)

    base = found([[1, 1], [0, 0]], [[3, 4]])
    numbers = quantised.numbers(found([[1, 0], [0, 0]], [[3, 3]]), base)
    assert (numbers["exact"], numbers["change"]) == (0.25, -0.25)
    assert numbers["exact_error"] == pytest.approx(0.25)  # texts of 1/2 and 0
    assert numbers["change_error"] == pytest.approx(0.25)
    assert numbers["logits_relative_error"] == pytest.approx(1 / 5)
    assert numbers["passkeys"] == 4


def test_no_samples_are_refused():
    with pytest.raises(InputError, match="at least 1"):
        QuantisedFlags(samples=0)

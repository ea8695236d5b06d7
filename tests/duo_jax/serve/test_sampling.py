"""Sampling: against transformers' logits processors, by statistics of draws, at the extremes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.errors import InputError
from duo_jax.serve.sampling import SamplingConfig, mark_seen, processed_logits, sample

VOCAB = 257
EVERYTHING = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.3,
}
CASES = {
    "plain softmax": {"temperature": 1.0},
    "cold": {"temperature": 0.25},
    "hot": {"temperature": 3.0},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_k of one": {"temperature": 1.0, "top_k": 1},
    "top_k beyond the vocabulary": {"temperature": 1.0, "top_k": VOCAB + 3},
    "top_k beyond int32": {"temperature": 1.0, "top_k": 10**12},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "small top_p": {"temperature": 1.0, "top_p": 1e-6},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "min_p of one": {"temperature": 1.0, "min_p": 1.0},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.5},
    "reward": {"temperature": 1.0, "repetition_penalty": 0.5},
    "greedy penalty": {"repetition_penalty": 1.5},
    "top_p after top_k": {"temperature": 2.0, "top_k": 10, "top_p": 0.6},
    "min_p after top_p": {"temperature": 2.0, "top_p": 0.95, "min_p": 0.02},
    "everything": EVERYTHING,
}


def random_logits(*, batch: int = 5, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    return 2.5 * np.random.default_rng(seed).standard_normal((batch, vocab), np.float32)


def random_history(*, batch: int = 5, vocab: int = VOCAB, length: int = 60) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab, (batch, length), np.int32)


def seen_in(history: np.ndarray, *, vocab: int = VOCAB) -> jax.Array:
    nothing = jnp.zeros((len(history), vocab), bool)
    return mark_seen(nothing, jnp.asarray(history), jnp.ones(history.shape, bool))


processed = jax.jit(processed_logits)  # traced once for the options that are on


def split_keys(number: int, *, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), number)


def processors(flags: dict) -> list:
    """Return what transformers' generate would build from these flags, in its order."""
    pytest.importorskip("torch", reason="transformers' processors need torch")
    from transformers.generation import logits_process as lp

    order = {
        "repetition_penalty": lp.RepetitionPenaltyLogitsProcessor,
        "temperature": lp.TemperatureLogitsWarper,
        "top_k": lp.TopKLogitsWarper,
        "top_p": lp.TopPLogitsWarper,
        "min_p": lp.MinPLogitsWarper,
    }
    return [make(flags[name]) for name, make in order.items() if flags.get(name)]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
@pytest.mark.parametrize("flags", CASES.values(), ids=CASES.keys())
def test_processed_logits_are_those_of_transformers(flags, seed):
    steps = processors(flags)
    import torch

    logits, history = random_logits(seed=seed), random_history()
    expected = torch.from_numpy(logits)
    for step in steps:
        expected = step(torch.from_numpy(history).long(), expected)
    expected = expected.numpy()
    options = SamplingConfig(**flags).options()
    result = np.asarray(processed(logits, options, seen_in(history)))
    if "temperature" in flags:  # equal up to a constant per row
        expected = expected - expected.max(axis=-1, keepdims=True)
        assert (result.max(axis=-1) == 0).all()
    np.testing.assert_array_equal(np.isneginf(result), np.isneginf(expected))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_ties_with_the_last_kept_token_are_kept():
    logits = jnp.log(jnp.asarray([[0.125, 0.25, 0.25, 0.25, 0.125]]))
    for flags in ({"top_k": 2}, {"top_p": 0.4}, {"top_k": 1, "top_p": 0.3}):
        options = SamplingConfig(temperature=1.0, **flags).options()
        kept = np.isfinite(processed_logits(logits, options, None))
        np.testing.assert_array_equal(kept, [[False, True, True, True, False]])


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = jnp.log(jnp.asarray([[0.0625, 0.5, 0.1875, 0.25]]))
    for top_p, number in ((0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.94, 4)):
        options = SamplingConfig(temperature=1.0, top_p=top_p).options()
        kept = np.isfinite(processed_logits(logits, options, None))
        assert kept.sum() == number, top_p


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 1.0},
        {"temperature": 1.6},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_softmax(flags):
    vocab, draws = 12, 20_000
    logits = jnp.asarray(random_logits(batch=1, vocab=vocab) / 2)
    options = SamplingConfig(**flags).options()
    rows = jnp.broadcast_to(logits, (draws, vocab))
    tokens = jax.jit(sample)(rows, options, split_keys(draws), None)
    counts = np.bincount(tokens, minlength=vocab)

    def misfit(probs: np.ndarray) -> float:
        """Return chi^2 per degree of freedom: about 1 for a true description."""
        assert not counts[probs == 0].any()
        possible = probs > 0
        expected = draws * probs[possible]
        chi2 = ((counts[possible] - expected) ** 2 / expected).sum()
        return chi2 / (possible.sum() - 1)

    probs = np.asarray(jax.nn.softmax(processed_logits(logits, options, None)[0]))
    assert misfit(probs) < 3.0
    # A temperature that is wrong by a tenth would be noticed.
    wrong = SamplingConfig(**(flags | {"temperature": 1.1 * flags["temperature"]})).options()
    wrong |= {"top_k": options["top_k"]} if "top_k" in options else {}
    scores = jnp.where(probs > 0, logits[0] / wrong["temperature"], -jnp.inf)
    assert misfit(np.asarray(jax.nn.softmax(scores))) > 3.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_without_a_temperature_the_first_of_the_most_probable_is_taken(dtype):
    logits = jnp.asarray(random_logits(vocab=40)).astype(dtype)
    greedy = SamplingConfig(top_k=3, top_p=0.5, min_p=0.1).options()
    assert greedy == {}
    nothing = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert [*nothing.options()] == ["temperature"]
    tokens = sample(logits, greedy, split_keys(5), None)
    np.testing.assert_array_equal(tokens, np.argmax(np.asarray(logits, np.float32), axis=-1))
    assert tokens.dtype == jnp.int32
    tied = jnp.asarray([[0.0, 3.0, 1.0, 3.0]], dtype)
    assert sample(tied, greedy, split_keys(1), None).tolist() == [1]


def test_greedy_obeys_the_penalty():
    logits = jnp.asarray([[3.0, 2.0, 1.0], [-1.0, -2.0, -3.0]])
    seen = jnp.asarray([[True, False, False], [True, True, False]])
    for penalty, expected in ((1.4, [0, 0]), (1.6, [1, 0]), (3.5, [1, 2])):
        options = SamplingConfig(repetition_penalty=penalty).options()
        assert sample(logits, options, split_keys(2), seen).tolist() == expected


def test_the_same_keys_draw_the_same_tokens_and_others_do_not():
    logits = jnp.asarray(random_logits(batch=200))
    options = SamplingConfig(temperature=1.0).options()
    first, again, other = (
        np.asarray(sample(logits, options, split_keys(200, seed=seed), None)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_a_row_draws_alone_what_it_draws_in_a_batch():
    logits, keys = jnp.asarray(random_logits(batch=64)), split_keys(64)
    seen = seen_in(random_history(batch=64))
    options = SamplingConfig(**EVERYTHING).options()
    together = sample(logits, options, keys, seen)
    one = jax.jit(sample)
    for row in range(64):
        rows = slice(row, row + 1)
        assert one(logits[rows], options, keys[rows], seen[rows])[0] == together[row]


def test_rows_with_equal_logits_draw_by_their_own_keys():
    logits = jnp.zeros((100, 1000))
    tokens = sample(logits, SamplingConfig(temperature=1.0).options(), split_keys(100), None)
    assert len(np.unique(tokens)) > 80


@pytest.mark.slow
def test_changed_values_do_not_compile_again_and_switched_options_do():
    traces = 0

    @jax.jit
    def counted(logits, options, keys, seen):
        nonlocal traces
        traces += 1
        return sample(logits, options, keys, seen)

    logits, seen = jnp.asarray(random_logits()), seen_in(random_history())
    results = []
    for flags in (
        EVERYTHING,
        {name: value / 2 for name, value in EVERYTHING.items()} | {"top_k": 1},
        {"temperature": 100.0, "top_k": VOCAB, "top_p": 1 - 1e-12, "min_p": 1e-50}
        | {"repetition_penalty": 2.0},
    ):
        options = SamplingConfig(**flags).options()
        results.append(counted(logits, options, split_keys(5), seen).tolist())
    assert traces == 1
    assert len({str(result) for result in results}) == 3  # the values did matter
    for number, name in enumerate(EVERYTHING, start=2):
        flags = {k: v for k, v in EVERYTHING.items() if k != name}
        counted(logits, SamplingConfig(**flags).options(), split_keys(5), seen)
        assert traces == number


def test_every_option_changes_the_processed_logits():
    logits, seen = jnp.asarray(random_logits()), seen_in(random_history())
    plain = processed_logits(logits, SamplingConfig(temperature=1.0).options(), seen)
    for name, value in EVERYTHING.items():
        options = SamplingConfig(**({"temperature": 1.0} | {name: value})).options()
        assert (processed_logits(logits, options, seen) != plain).any(), name


def test_values_that_change_nothing_are_off():
    neutral = SamplingConfig(temperature=1.0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert set(neutral.options()) == {"temperature"}
    assert SamplingConfig().options() == {}
    every = SamplingConfig(**EVERYTHING).options()
    assert set(every) == set(EVERYTHING)
    assert {name: (x.shape, x.dtype.name) for name, x in every.items()} == {
        name: ((), "int32" if name == "top_k" else "float32") for name in EVERYTHING
    }


def test_the_vocabulary_is_sorted_once_and_only_if_it_must_be():
    args = (jnp.asarray(random_logits()), split_keys(5), seen_in(random_history()))
    for size in range(len(EVERYTHING) + 1):
        for names in itertools.combinations(EVERYTHING, size):
            options = SamplingConfig(**{name: EVERYTHING[name] for name in names}).options()
            logits, keys, seen = args
            text = str(jax.make_jaxpr(sample)(logits, options, keys, seen))
            needed = "top_k" in options or "top_p" in options
            assert text.count(" sort[") == int(needed), names
            assert "top_k[" not in text


EXTREMES = {
    "one token left": [-np.inf, 5.0, -np.inf, -np.inf],
    "nothing left": [-np.inf] * 4,
    "infinite": [0.0, np.inf, 1.0, -np.inf],
    "two infinite": [np.inf, np.inf, 0.0, -np.inf],
    "largest float32": [3.4e38, -3.4e38, 0.0, 3.3e38],
    "all huge": [-3.3e38, -3.4e38, -np.inf, -3.4e38],
    "tiny": [1e-45, -1e-45, 1e-38, 0.0],
    "all equal": [0.0] * 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_give_valid_tokens(dtype):
    logits = jnp.asarray(list(EXTREMES.values()), jnp.float32).astype(dtype)
    possible, keys = np.asarray(logits) > -np.inf, split_keys(len(logits))
    seen = jnp.broadcast_to(jnp.asarray([True, False, True, True]), logits.shape)
    for temperature, rest, penalty in itertools.product(
        (0.0, 1e-300, 1e-3, 1.0, 1e3, 1e300),
        (
            {},
            {"top_k": 3},
            {"top_p": 0.5},
            {"min_p": 0.5},
            {"top_k": 2, "top_p": 0.9, "min_p": 1.0},
        ),
        (None, 1e-300, 0.5, 2.0, 1e300),
    ):
        config = SamplingConfig(temperature=temperature, repetition_penalty=penalty, **rest)
        scores = processed_logits(logits, config.options(), seen)
        assert scores.dtype == jnp.float32
        assert not np.isnan(scores).any()
        if temperature:
            assert not np.isposinf(scores).any()
        tokens = np.asarray(sample(logits, config.options(), keys, seen))
        assert ((tokens >= 0) & (tokens < 4)).all()
        # A huge penalty may drive a logit out of float32, and with it every token of a row.
        if penalty != 1e300:
            kept = possible[np.arange(len(tokens)), tokens] | ~possible.any(axis=1)
            assert kept.all(), [name for name, row in zip(EXTREMES, kept, strict=True) if not row]


def test_a_tiny_temperature_takes_the_most_probable():
    logits = jnp.asarray(random_logits())
    options = SamplingConfig(temperature=1e-300).options()
    np.testing.assert_array_equal(
        sample(logits, options, split_keys(5), None), np.argmax(logits, axis=-1)
    )


def test_mark_seen_marks_valid_tokens_of_its_own_row():
    seen = jnp.zeros((3, 5), bool).at[2, 0].set(True)
    tokens = jnp.asarray([[1, 4, 1], [2, -1, 99], [3, -2, 5]])
    valid = jnp.asarray([[True, True, False], [False, True, True], [True, False, True]])
    expected = np.asarray([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]], bool)
    np.testing.assert_array_equal(jax.jit(mark_seen)(seen, tokens, valid), expected)
    one = mark_seen(seen, jnp.asarray([[0], [1], [2]]), jnp.asarray([[True], [False], [True]]))
    expected = np.asarray([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]], bool)
    np.testing.assert_array_equal(one, expected)
    assert not seen[0].any()


def test_a_penalty_without_seen_tokens_is_refused():
    options = SamplingConfig(repetition_penalty=2.0).options()
    with pytest.raises(ValueError, match="needs the seen tokens"):
        sample(jnp.zeros((1, 4)), options, split_keys(1), None)


NAN = float("nan")
INF = float("inf")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 is not a number from 0"),
        ({"temperature": NAN}, "temperature nan is not a number from 0"),
        ({"temperature": INF}, "temperature inf is not a finite number"),
        ({"top_k": -3}, "top_k -3 is not a whole number from 0"),
        ({"top_p": 0.0}, "top_p 0.0 is not a number above 0, at most 1"),
        ({"top_p": 1.01}, "top_p 1.01 is not a number above 0, at most 1"),
        ({"top_p": NAN}, "top_p nan is not a number above 0, at most 1"),
        ({"min_p": -0.1}, "min_p -0.1 is not a number from 0 to 1"),
        ({"min_p": 1.5}, "min_p 1.5 is not a number from 0 to 1"),
        ({"min_p": NAN}, "min_p nan is not a number from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is not a number above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty -1.0 is not a number above 0"),
        ({"repetition_penalty": NAN}, "repetition_penalty nan is not a number above 0"),
        ({"repetition_penalty": INF}, "repetition_penalty inf is not a finite number"),
    ],
    ids=str,
)
def test_impossible_values_are_refused_in_one_line(flags, message):
    with pytest.raises(InputError) as caught:
        SamplingConfig(**flags)
    assert str(caught.value) == message

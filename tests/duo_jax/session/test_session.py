"""Reading and writing on, row by row, on tiny random models in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import serve
from duo_jax.cache import init_cache
from duo_jax.errors import InputError
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.serve import decoding
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.serve.teacher_forcing import decode_tokens
from duo_jax.session import limits, row_cache
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from tests import models
from tests.params import random_params

# Hints are checked in the tests of evicting sessions, and of saved ones.
pytestmark = [pytest.mark.core, pytest.mark.usefixtures("unhooked_file")]

# One layer: what sessions do with rows does not depend on layers, and compiles in half the time.
RAW = models.llama(num_key_value_heads=4, num_attention_heads=4, num_hidden_layers=1)
CONFIG = parse_config(RAW)
HEADS = np.array([[0, 1, 0, 1]], bool)
CHUNK = 16


@pytest.fixture(scope="module")
def runtime():
    params = random_params(CONFIG)
    # Sharper than at random, so that greedy choices have no near ties.
    params["lm_head"]["kernel"] = 5 * params["lm_head"]["kernel"]
    return Runtime(
        config=duo_config(CONFIG, HEADS, sink_size=4, recent_size=8),
        params=split_params(CONFIG, params, HEADS),
        prefill_chunk=CHUNK,
    )


def prompt(length, seed=0):
    return models.tokens(RAW, batch=1, length=length, seed=seed)[0].tolist()


def write(session, max_new_tokens=12, **settings):
    rows = [[] for _ in session.tokens]
    for new in session.decode(max_new_tokens=max_new_tokens, **settings):
        for row, tokens in zip(rows, new, strict=True):
            row.extend(tokens)
    return rows


def read_and_write(runtime, *prompts, **settings):
    session = Session(runtime, batch_size=len(prompts))
    session.append(prompts)
    return write(session, **settings)


def greedy_by_forwards(runtime, tokens, count):
    """Decode without a cache: one forward over everything per token."""
    tokens, length = list(tokens), len(tokens) + count
    prefill = jax.jit(serve.prefill, static_argnums=0)
    for _ in range(count):
        cache = init_cache(runtime.config, batch_size=1, max_len=length)
        padded = jnp.array([tokens + [0] * (length - len(tokens))])
        logits, _ = prefill(runtime.config, runtime.params, cache, padded, jnp.array([len(tokens)]))
        tokens.append(int(jnp.argmax(logits[0])))
    return tokens[-count:]


@pytest.mark.slow  # test_generate_parity.py compares what is greedy with transformers
def test_greedy_equals_repeated_forwards(runtime):
    tokens = prompt(21)
    assert read_and_write(runtime, tokens, max_new_tokens=6) == [
        greedy_by_forwards(runtime, tokens, 6)
    ]


@pytest.mark.parametrize("segment", [1, 5, None])
def test_segments_do_not_change_the_tokens(runtime, segment):
    settings = {"sampling": SamplingConfig(temperature=1.0, repetition_penalty=1.2), "seed": 3}
    whole = read_and_write(runtime, prompt(20), **settings)
    assert read_and_write(runtime, prompt(20), segment=segment, **settings) == whole


def test_seeds_decide_the_draws(runtime):
    hot = SamplingConfig(temperature=2.0)
    first = read_and_write(runtime, prompt(9), prompt(9), sampling=hot, seed=1)
    assert first == read_and_write(runtime, prompt(9), prompt(9), sampling=hot, seed=1)
    assert first != read_and_write(runtime, prompt(9), prompt(9), sampling=hot, seed=2)
    assert first[0] != first[1]  # equal rows draw independently


@pytest.mark.slow
def test_repetition_penalty_counts_the_prompt(runtime):
    tokens = prompt(20)
    [plain] = read_and_write(runtime, tokens, max_new_tokens=1)
    tokens += plain
    strong = SamplingConfig(repetition_penalty=1e6)
    [written] = read_and_write(runtime, tokens, sampling=strong, max_new_tokens=20)
    assert len(set(written)) == 20
    assert not set(written) & set(tokens)


def test_rows_stop_one_by_one(runtime):
    prompts = [prompt(9), prompt(12, seed=1)]
    free = read_and_write(runtime, *prompts, max_new_tokens=30)
    stops = [free[0][3], free[1][7]]
    expected = []
    for row in free:
        end = next((i for i, token in enumerate(row) if token in stops), 29)
        expected.append(row[: end + 1])
    assert len(set(map(len, expected))) > 1
    assert read_and_write(runtime, *prompts, max_new_tokens=30, stop_tokens=stops) == expected


def test_a_caller_can_end_a_row(runtime):
    session, ended, counts = Session(runtime, batch_size=2), set(), [0, 0]
    session.append([prompt(5), prompt(7)])
    for new in session.decode(max_new_tokens=10, segment=2, ended=ended):
        counts = [count + len(row) for count, row in zip(counts, new, strict=True)]
        ended.add(1)
    assert counts == [10, 1]
    assert [len(row) for row in session.tokens] == [15, 8]


def test_rows_may_be_appended_to_unevenly(runtime):
    session = Session(runtime, batch_size=2)
    session.append([prompt(20), prompt(8)])
    session.append([[], prompt(9, seed=5)])
    expected = read_and_write(runtime, prompt(20), [*prompt(8), *prompt(9, seed=5)])
    assert write(session) == expected


def test_another_text_is_read_from_its_beginning(runtime):
    session = Session(runtime)
    session.append([prompt(30)])
    session.replace([prompt(30)[:20] + prompt(5, seed=9)])
    assert write(session) == read_and_write(runtime, prompt(30)[:20] + prompt(5, seed=9))


# The others go back as these do, and rings do whatever the format.
OFTEN = [("int4", True), ("model", False)]
RARELY = [("bf16", True), ("int8", True), ("bf16", False), ("int8", False), ("int4", False)]
RARELY += [("model", True), ("int2", True), ("int2", False)]


@pytest.mark.parametrize(
    ("kv", "full"), [*OFTEN, *(pytest.param(*x, marks=pytest.mark.slow) for x in RARELY)]
)
def test_a_cache_goes_back_where_nothing_was_overwritten(runtime, kv, full):
    """As far as two texts begin alike; a ring of 4 + 8 tokens that has gone round cannot."""
    config = runtime.config.all_retrieval() if full else runtime.config
    runtime = dataclasses.replace(runtime, config=config, kv_format=kv)
    for length, kept in ((12, 9), (13, 9), (30, 20), (12, 11)):
        other = prompt(length)[:kept] + prompt(6, seed=9)
        session = Session(runtime)
        session.append([prompt(length)])
        before = session.timing.prefill_tokens
        session.replace([list(other)])
        goes_back = kv != "int2" and (full or length <= 12)
        read = len(other) - (kept if goes_back else 0)
        assert session.timing.prefill_tokens - before == read
        assert write(session) == read_and_write(runtime, other)
        shorter = Session(runtime)
        shorter.append([prompt(length)])
        shorter.replace([prompt(length)[:kept]])
        assert write(shorter) == read_and_write(runtime, prompt(length)[:kept])


def test_rows_go_back_each_by_its_own(runtime):
    session = Session(runtime, batch_size=2)
    session.append([prompt(9), prompt(11, seed=1)])
    rows = [prompt(9)[:3] + prompt(5, seed=2), [*prompt(11, seed=1), 7]]
    session.replace([*map(list, rows)])
    assert session.timing.prefill_tokens == 20 + 5 + 1
    assert write(session) == read_and_write(runtime, *rows)


def test_the_same_text_without_its_last_token_is_read_again(runtime):
    session = Session(runtime)
    session.append([prompt(30)])
    written = write(session)[0]
    session.replace([[*prompt(30), *written[:-1]]])
    assert write(session) == read_and_write(runtime, [*prompt(30), *written[:-1]])


def test_a_cache_grows_with_its_text(runtime, monkeypatch):
    monkeypatch.setattr(limits, "_SMALLEST_CACHE", 8)
    monkeypatch.setattr(limits, "_SMALLEST_ROW", 8)
    session = Session(runtime)
    session.append([prompt(10)])
    small = session.capacity
    session.append([prompt(60, seed=1)])
    assert small < 70 <= session.capacity
    assert write(session) == read_and_write(runtime, prompt(10) + prompt(60, seed=1))


def test_an_interrupted_step_is_made_up_for(runtime, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    session = Session(runtime)
    session.append([prompt(20)])
    expected = read_and_write(runtime, prompt(20))[0]
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode_segment", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(session)
    assert session.tokens == [prompt(20) + expected[:1]]
    assert write(session, 11) == [expected[1:]]
    with monkeypatch.context() as patch:
        patch.setattr(row_cache, "_prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.append([prompt(5, seed=1)])
    after = read_and_write(runtime, prompt(20) + expected + prompt(5, seed=1))
    assert write(session) == after


@pytest.mark.slow  # test_few_programs.py counts the shapes, test_sampling.py what options trace
def test_one_compilation_serves_a_length_bucket(runtime):
    def traces():
        return row_cache._prefill._cache_size(), decoding.decode_segment._cache_size()

    read_and_write(runtime, prompt(5), sampling=SamplingConfig(temperature=0.5))
    before = traces()
    for length, temperature in ((6, 0.7), (11, 2.0), (16, 0.1)):
        sampling = SamplingConfig(temperature=temperature)
        read_and_write(runtime, prompt(length), max_new_tokens=length, sampling=sampling)
    assert traces() == before
    four = [prompt(5)] * 4  # a batch size of its own
    read_and_write(runtime, *four, sampling=SamplingConfig(temperature=0.5))
    assert traces() == (before[0] + 1, before[1] + 1)


def test_writing_ends_at_the_model_s_range(runtime):
    room = CONFIG.max_positions - 120
    assert [len(row) for row in read_and_write(runtime, prompt(120), max_new_tokens=50)] == [room]
    session = Session(runtime)
    session.append([prompt(CONFIG.max_positions)])
    with pytest.raises(InputError, match=r"128 tokens leave no room.*range is 128"):
        write(session)


@pytest.mark.parametrize(
    ("tokens", "max_len", "message"),
    [
        ([], None, "prompt is empty"),
        ([0] * 129, None, r"129 tokens are too many: the model's range is 128"),
        ([0] * 33, 32, r"33 tokens are too many: the cache was made for 32"),
        ([3, 96], None, r"token 96 is not one of the model's 96"),
        ([3, -1], None, r"token -1 is not one of the model's 96"),
    ],
)
def test_rows_that_cannot_be_read(runtime, tokens, max_len, message):
    session = Session(runtime, max_len=max_len)
    session.append([prompt(4)])
    with pytest.raises(InputError, match=message):
        session.replace([tokens])
    assert session.tokens == [prompt(4)]


@pytest.mark.slow
def test_a_fixed_cache_is_allocated_once(runtime):
    session = Session(runtime, max_len=40)
    session.append([prompt(10)])
    assert session.cache.layers[0].full[0].keys.shape[2] == 40
    assert [len(row) for row in write(session, 100)] == [30]


def test_impossible_sessions(runtime):
    with pytest.raises(InputError, match="batch_size 0"):
        Session(runtime, batch_size=0)
    with pytest.raises(InputError, match="max_len 0 is not"):
        Session(runtime, max_len=0)
    with pytest.raises(InputError, match="nothing has been read"):
        Session(runtime).snapshot()
    with pytest.raises(InputError, match="1 rows of tokens for a session of 2"):
        Session(runtime, batch_size=2).append([[1]])


def borrow(session):
    with session.borrowed():
        pass


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda session: session.append([prompt(3, seed=1)]),
        lambda session: next(session.decode(max_new_tokens=10)),
        borrow,
    ],
    ids=["more text", "another stream", "a loan"],
)
def test_a_stream_ends_when_its_session_goes_on_without_it(runtime, meanwhile):
    session = Session(runtime)
    session.append([prompt(9)])
    stream = session.decode(max_new_tokens=10, segment=1)
    next(stream)
    meanwhile(session)
    after = [*session.tokens[0]]
    with pytest.raises(InputError, match="went on meanwhile"):
        next(stream)
    assert write(session) == read_and_write(runtime, after)


def test_a_borrowed_cache_comes_back_with_the_tokens_that_were_decoded(runtime):
    session = Session(runtime)
    session.append([prompt(9)])
    more = prompt(3, seed=1)
    with session.borrowed(room=3) as loan:
        _, loan.cache = decode_tokens(
            runtime.config,
            runtime.params,
            loan.take(),
            jnp.array([more]),
            jnp.ones((1, 3), bool),
            implementation="xla",
        )
        loan.tokens = [more]
    assert session.tokens == [prompt(9) + more]
    assert np.asarray(session.cache.lengths).tolist() == [12]
    assert write(session) == read_and_write(runtime, prompt(9) + more)


def test_a_cache_that_a_borrower_lost_is_read_again(runtime):
    session = Session(runtime)
    session.append([prompt(9)])
    with pytest.raises(KeyboardInterrupt), session.borrowed():
        raise KeyboardInterrupt
    assert session.cache is None
    assert write(session) == read_and_write(runtime, prompt(9))


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"max_new_tokens": 2**31}, {"seed": -1}, {"seed": 2**32}]
)
def test_numbers_out_of_range(runtime, settings):
    session = Session(runtime)
    session.append([prompt(4)])
    with pytest.raises(InputError, match="is not a whole number from"):
        write(session, **settings)

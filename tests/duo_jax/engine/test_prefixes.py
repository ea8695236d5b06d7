"""Beginnings of texts that an engine keeps: what is shared, and what that must not change."""

import numpy as np
import pytest

import duo_jax
from duo_jax import InputError
from duo_jax.engine import Request
from tests.duo_jax.engine.asking import LONG, make, request, run
from tests.small_demo import small_demo

pytestmark = pytest.mark.usefixtures("unhooked")


def test_a_known_beginning_is_not_read_again(model):
    served = make(model)
    [cold] = run(served, request(model, LONG))
    read = served.stats().prompt_tokens
    [warm] = run(served, request(model, LONG))
    num_tokens = len(model.tokenization.encode(LONG))
    assert cold.cached == 0
    assert warm.cached == (num_tokens - 1) // 64 * 64
    assert served.stats().prompt_tokens - read == num_tokens - warm.cached
    assert warm.text == cold.text
    fresh = make(model, prefix_reuse=False)
    [same] = run(fresh, request(model, LONG))
    assert (same.cached, same.text) == (0, cold.text)


def test_a_text_goes_on_where_an_answer_ended(model):
    """Its last page is not full: it is copied, and two ways of going on do not meet."""
    served = make(model)
    [first] = run(served, request(model, LONG, logprobs=0))
    whole = (*model.tokenization.encode(LONG), *first.tokens)
    tails = [(*whole, 7, 8, 9), (*whole, 10, 11)]
    answers = run(served, *(Request(prompt=tail, max_tokens=30, logprobs=0) for tail in tails))
    cold = run(
        make(model, prefix_reuse=False),
        *(Request(prompt=tail, max_tokens=30, logprobs=0) for tail in tails),
    )
    for warm, other in zip(answers, cold, strict=True):
        assert warm.cached == len(whole) - 1  # the last token was never read
        assert warm.tokens == other.tokens
        np.testing.assert_allclose(
            [x.logprob for x in warm.logprobs], [x.logprob for x in other.logprobs], atol=1e-5
        )


def test_texts_with_a_common_beginning_share_it_from_the_second_on(model):
    """Nothing ends where they part, until one has been read with a halt there."""
    served = make(model, prefill_chunk=256, max_len=512)
    common = tuple(model.tokenization.encode(LONG))[:150]
    tails = [(tail,) * 80 for tail in (5, 6, 7)]
    answers = [run(served, Request(prompt=common + t, max_tokens=2))[0] for t in tails]
    assert [answer.cached for answer in answers] == [0, 0, 128]


@pytest.mark.slow
def test_a_prompt_that_is_read_twice_does_not_count_what_it_left_itself(model):
    """It gives up its pages for an older text, but for one that is kept, and finds this again."""
    served = make(model, max_requests=2, cache_tokens=384, prefill_chunk=1)
    older = Request(prompt=(5,), max_tokens=150, ignore_eos=True)
    _, new = run(served, older, Request(prompt=tuple(range(20, 220)), max_tokens=2))
    stats = served.stats()
    assert (stats.preempted, stats.cached_tokens) == (1, 64)
    assert new.cached == 0


def test_prefixes_are_forgotten_where_pages_or_snapshots_run_out(model):
    served = make(model, snapshots=2, cache_tokens=512)
    for start in range(2, 12):
        run(served, Request(prompt=tuple(range(start, start + 80)), max_tokens=2))
    stats = served.stats()
    assert stats.pages_used == 0
    assert stats.pages_reusable <= 4
    [last] = run(served, Request(prompt=tuple(range(11, 91)), max_tokens=2))
    assert last.cached == 64


@pytest.mark.slow
# int2 has all that int4 has, and blocks and a ring of the latest tokens.
@pytest.mark.parametrize("kv", ["int4", "int2"])
def test_packed_caches_are_shared_and_preempted_too(kv):
    model = duo_jax.load(small_demo(), sink_size=4, recent_size=12, prefill_chunk=64, kv=kv)
    narrow, wide = make(model, cache_tokens=320), make(model)
    texts = [LONG, LONG + " And", "Once upon a time"]
    asked = [request(model, prompt, max_tokens=60, logprobs=0) for prompt in texts]
    cold, warm, preempted = run(wide, *asked), run(wide, *asked), run(narrow, *asked)
    assert warm[0].cached > 0
    assert narrow.stats().preempted > 0
    for answers in zip(cold, warm, preempted, strict=True):
        # A code may flip where a sum is rounded otherwise.
        starts = [np.mean([x.logprob for x in one.logprobs[:10]]) for one in answers]
        np.testing.assert_allclose(starts, starts[0], atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["model", "int2"])
def test_a_saved_text_can_be_pinned(kv, tmp_path):
    """It stays while others come and go, and gives what reading it gives."""
    model = duo_jax.load(small_demo(), sink_size=4, recent_size=12, prefill_chunk=64, kv=kv)
    book = model.conversation()
    book.append(LONG)
    book.save(tmp_path / "book")
    served = make(model, max_len=320, cache_tokens=512)
    length = served.pin(tmp_path / "book")
    asked = Request(prompt=(*book.session.tokens[0], 5, 6, 7), max_tokens=10, logprobs=0)
    [answer] = run(served, asked)
    [cold] = run(make(model), asked)
    assert (answer.cached, cold.cached) == (length, 0)
    np.testing.assert_allclose(
        [x.logprob for x in answer.logprobs][:1], [x.logprob for x in cold.logprobs][:1], atol=1e-3
    )
    for start in range(2, 8):
        run(served, Request(prompt=tuple(range(start, start + 200)), max_tokens=2))
    assert run(served, asked)[0].cached >= length
    assert served.pin(tmp_path / "book") == length  # it is there already
    decode, served._scheduler._device.decode = served._scheduler._device.decode, None
    assert run(served, asked)[0].reason == "error"  # a step fails, and all caches are emptied
    served._scheduler._device.decode = decode
    assert run(served, asked)[0].cached == length
    narrow = make(model, max_len=320, cache_tokens=320 + 64)
    with pytest.raises(InputError, match="tokens do not fit beside a request of 320"):
        narrow.pin(tmp_path / "book")

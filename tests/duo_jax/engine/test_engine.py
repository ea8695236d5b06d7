"""The engine: what a request gets depends on nobody else, and no page is ever lost."""

import dataclasses
import threading

import numpy as np
import pytest

from duo_jax import InputError, SamplingConfig
from duo_jax.engine import DrainingError, QueueFullError, Request, engine
from duo_jax.serve import rows
from tests.duo_jax.engine.asking import DRAWN, LONG, PROMPTS, Answer, alone, make, request, run

pytestmark = pytest.mark.usefixtures("unhooked")


@pytest.fixture(scope="module")
def expected(model):
    """Return texts of PROMPTS, greedy and drawn, written one at a time."""
    return {
        drawn: [
            alone(model, prompt, seed=index, sampling=DRAWN if drawn else None)
            for index, prompt in enumerate(PROMPTS)
        ]
        for drawn in (False, True)
    }


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 3, 1, 0]])
def test_a_request_gets_what_it_would_get_alone(model, expected, order):
    """Greedy and drawn ones together, more than there are rows, in any order."""
    served, asked = make(model), []
    for index in order:
        for drawn in (False, True):
            settings = {"sampling": DRAWN, "seed": index} if drawn else {}
            asked.append((drawn, index, request(model, PROMPTS[index], **settings)))
    answers = run(served, *(each for _, _, each in asked))
    for (drawn, index, _), answer in zip(asked, answers, strict=True):
        assert answer.text == expected[drawn][index]
        assert answer.reason == "length"
        assert len(answer.tokens) == 20
    assert served.stats().preempted == 0


@pytest.mark.parametrize("reuse", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_preempted_requests_get_the_same(model, expected, reuse):
    """There are pages for one long text and a bit."""
    served = make(model, cache_tokens=320, prefix_reuse=reuse)
    drawn = [
        request(model, prompt, sampling=DRAWN, seed=index, max_tokens=20)
        for index, prompt in enumerate(PROMPTS)
    ]
    short = [request(model, "Once upon a time", max_tokens=250) for _ in range(2)]
    answers = run(served, *short, *drawn)
    assert [answer.text for answer in answers[2:]] == expected[True]
    assert answers[0].text == answers[1].text
    assert served.stats().preempted > 0
    assert served.stats().pages_used == 0


@pytest.mark.slow
def test_few_programs_serve_any_load(model):
    before = rows.decode_rows._cache_size(), rows.prefill_row._cache_size()
    served = make(model, max_requests=5, cache_tokens=1088)  # of a size that no other test has
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 9):
        lengths = rng.integers(1, 300, count)
        run(served, *(Request(prompt=(5,) * int(n), max_tokens=3) for n in lengths))
    assert served.sizes.buckets == (1, 4, 5)
    assert rows.decode_rows._cache_size() - before[0] <= 3
    assert rows.prefill_row._cache_size() - before[1] <= 1  # of chunks up to 64


def test_log_probabilities_are_the_models_own(model):
    """Of written and of prompt tokens alike, whatever the temperature."""
    served = make(model)
    prompt = tuple(model.tokenization.encode(PROMPTS[3]))
    warm = Request(
        prompt=prompt, max_tokens=6, sampling=DRAWN, seed=3, logprobs=5, prompt_logprobs=3
    )
    [answer] = run(served, warm)
    whole = prompt + tuple(answer.tokens)
    [again] = run(served, Request(prompt=whole, max_tokens=0, prompt_logprobs=5))
    assert again.tokens == []
    assert again.reason == "length"
    told = again.updates[0].prompt_logprobs
    assert told[0] is None
    assert [item.token for item in told[1:]] == list(whole[1:])
    written = told[len(prompt) :]
    np.testing.assert_allclose(
        [x.logprob for x in answer.logprobs], [x.logprob for x in written], atol=1e-5
    )
    for item in told[1:]:
        tops = [logprob for _, logprob in item.top]
        assert tops == sorted(tops, reverse=True)
        assert len(tops) == 5
        assert item.logprob <= tops[0] + 1e-6
    early = answer.updates[0].prompt_logprobs
    assert len(early) == len(prompt)
    np.testing.assert_allclose(
        [x.logprob for x in early[1:]], [x.logprob for x in told[1 : len(prompt)]], atol=1e-5
    )
    total = sum(np.exp(logprob) for _, logprob in told[5].top)
    assert 0 < total <= 1 + 1e-5


class Only:
    """Allows one token at a time."""

    def __init__(self, tokens, vocab_size):
        self._tokens, self._words = list(tokens), -(-vocab_size // 32)

    def allowed(self):
        bits = np.zeros(self._words * 32, np.uint8)
        bits[self._tokens[0]] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token):
        assert token == self._tokens.pop(0)


def test_settings_hold_for_their_own_request(model):
    """Bias, penalties and a grammar beside a request that has none of them."""
    served = make(model)
    vocab_size = model.config.architecture.vocab_size
    [plain] = run(served, request(model, "Once upon a time"))
    wanted = [70, 71, 500, 3, 70]
    biased, penalised, filtered, same = run(
        served,
        request(model, "Once upon a time", logit_bias={70: 100.0}),
        request(model, "Once upon a time", frequency_penalty=2.0, presence_penalty=2.0),
        request(model, "Once upon a time", max_tokens=5, token_filter=Only(wanted, vocab_size)),
        request(model, "Once upon a time"),
    )
    assert biased.tokens == [70] * 20
    assert filtered.tokens == wanted
    assert same.text == plain.text
    most = max(np.bincount(plain.tokens))
    assert max(np.bincount(penalised.tokens)) < most
    repetition = SamplingConfig(repetition_penalty=1.3)
    [repeated] = run(served, request(model, "Once upon a time", sampling=repetition))
    assert repeated.text == alone(model, "Once upon a time", repetition_penalty=1.3)


def test_texts_end_with_stop_strings_and_tokens(model):
    served = make(model)
    [plain] = run(served, request(model, PROMPTS[3]))
    stop = plain.text[4:7]
    ended, at_token = run(
        served,
        request(model, PROMPTS[3], stop=(stop,)),
        request(model, PROMPTS[3], stop_tokens=(plain.tokens[2],)),
    )
    assert (ended.text, ended.reason) == (plain.text[: plain.text.index(stop)], "stop")
    first = plain.tokens.index(plain.tokens[2])
    assert (at_token.tokens, at_token.reason) == (plain.tokens[: first + 1], "stop")
    assert ended.text == alone(model, PROMPTS[3], stop=stop)


@pytest.mark.slow
def test_choices_of_a_seed_differ_as_rows_of_a_batch_do(model):
    served = make(model)
    seed = 2**32 - 1
    texts = model.generate(["A", "A"], max_new_tokens=20, seed=seed, temperature=1.0)
    settings = {"sampling": SamplingConfig(temperature=1.0), "seed": seed}
    answers = run(served, *(request(model, "A", choice=n, **settings) for n in range(2)))
    assert [answer.text for answer in answers] == texts


def test_cancelled_requests_free_their_pages(model):
    """While they wait, are read, and are written; others go on."""
    served = make(model)
    answers = [Answer() for _ in range(6)]
    tickets = [served.submit(request(model, LONG, max_tokens=40), each) for each in answers]
    served.step()
    served.cancel(tickets[0])  # is being read
    for _ in range(6):
        served.step()
        served.check()
    served.cancel(tickets[1])  # is written
    served.cancel(tickets[5])  # waits
    served.cancel(12345)
    while served.step():
        served.check()
    reasons = [answer.reason for answer in answers]
    assert reasons == ["cancelled", "cancelled", "length", "length", "length", "cancelled"]
    assert answers[2].text == alone(model, LONG, max_tokens=40)
    stats = served.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_one_that_fails_disturbs_no_other(model, expected, capsys):
    """A grammar that breaks, a listener that raises; then a step that fails."""
    served = make(model)
    vocab_size = model.config.architecture.vocab_size

    def deaf(_):
        raise OSError("nobody listens")

    served.submit(request(model, "A"), deaf)
    broken, fine = run(
        served,
        request(model, "A", token_filter=Only([3], vocab_size)),  # has no second token
        request(model, PROMPTS[0]),
    )
    assert (broken.reason, len(broken.updates)) == ("error", 1)
    assert "IndexError" in broken.updates[-1].error
    assert fine.text == expected[False][0]
    assert capsys.readouterr().err.count("OSError: nobody listens") == 1

    decode = served._scheduler._device.decode
    served._scheduler._device.decode = None
    [lost] = run(served, request(model, PROMPTS[0]))
    assert lost.reason == "error"
    served._scheduler._device.decode = decode
    [after] = run(served, request(model, PROMPTS[0]))
    assert after.text == expected[False][0]
    assert "TypeError" in capsys.readouterr().err


def test_a_prompt_may_fill_all_there_is(model):
    """With nothing to write after it, it takes no further page; a kept prefix gives way."""
    served = make(model, max_len=320, cache_tokens=320)
    tokens = tuple(model.tokenization.encode(LONG * 3))[:320]
    [answer] = run(served, Request(prompt=tokens, max_tokens=0, prompt_logprobs=0))
    assert answer.reason == "length"
    assert len(answer.updates[0].prompt_logprobs) == 320
    [short] = run(served, Request(prompt=tokens[:100], max_tokens=10, ignore_eos=True))
    whole = (*tokens[:100], *short.tokens, *tokens[110:])[:312]
    [long] = run(served, Request(prompt=whole, max_tokens=8, ignore_eos=True))
    assert (long.reason, len(long.tokens)) == ("length", 8)


def test_what_cannot_be_served_is_refused_at_once(model):
    served = make(model, queue=2)
    for bad, message in [
        ({"prompt": (1,) * 300, "max_tokens": 21}, "300 tokens and 21 new ones are more than"),
        ({"prompt": (1,) * 400, "max_tokens": 1}, "400 tokens are too many"),
        ({"prompt": (99_999,), "max_tokens": 1}, "token 99,999 is not one"),
        ({"prompt": (1,), "max_tokens": 1, "logit_bias": {-1: 1.0}}, "token -1 is not one"),
        ({"prompt": (), "max_tokens": 1}, "the prompt is empty"),
        ({"prompt": "abc", "max_tokens": 1}, "prompt 'abc' is not a tuple of tokens"),
        ({"prompt": (True,), "max_tokens": 1}, "is not a tuple of tokens"),
        ({"prompt": (1,), "max_tokens": 1, "logit_bias": {5: float("nan")}}, "not finite"),
        ({"prompt": (1,), "max_tokens": 1, "stop": "ab"}, "stop 'ab' is not"),
        ({"prompt": (1,), "max_tokens": 1, "logprobs": 21}, "logprobs 21"),
        ({"prompt": (1,), "max_tokens": 1, "stop": ("",)}, "a stop string is empty"),
    ]:
        with pytest.raises(InputError, match=message):
            served.submit(Request(**bad), print)
    for _ in range(2):
        served.submit(Request(prompt=(1,), max_tokens=1), Answer())
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        served.submit(Request(prompt=(1,), max_tokens=1), Answer())
    while served.step():
        pass
    for bad, message in [
        ({"cache_tokens": 300}, "does not fit into a cache of 256 tokens"),
        ({"page_size": 96}, "page_size 96 is not a power of two"),
        ({"max_requests": 0}, "max_requests 0"),
        ({"max_len": 1025}, "max_len 1,025 is beyond the model's range of 1,024 tokens"),
        ({"prefix_reuse": "no"}, "prefix_reuse 'no'"),
    ]:
        with pytest.raises(InputError, match=message):
            make(model, **bad)
    for change, message in [({"keep": 0.5}, "does not evict"), ({"prefill_mode": "chunk"}, "cut")]:
        other = dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, **change))
        with pytest.raises(InputError, match=message):
            make(other)


def test_a_thread_serves_many_others(model, expected):
    """Requests from threads of their own, while another is in `run`; then it drains."""
    served = make(model)
    thread = threading.Thread(target=served.run)
    thread.start()
    texts = {}

    def ask(index):
        answer, done = Answer(), threading.Event()

        def hear(update):
            answer(update)
            if update.finish_reason:
                done.set()

        served.submit(request(model, PROMPTS[index % 5]), hear)
        assert done.wait(120)
        texts[index] = answer.text

    threads = [threading.Thread(target=ask, args=[index]) for index in range(10)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [texts[index] for index in range(10)] == expected[False] * 2
    last = Answer()
    served.submit(request(model, LONG, max_tokens=30), last)
    assert served.drain(120)
    assert last.reason == "length"
    with pytest.raises(DrainingError):
        served.submit(request(model, "A"), print)
    served.close()
    thread.join(60)
    assert not thread.is_alive()


def test_closing_cancels_what_has_not_begun(model):
    served, answer = make(model), Answer()
    served.submit(request(model, "A"), answer)
    served.close()
    served.run()
    assert answer.reason == "cancelled"


def test_stats_count_the_bytes_in_use(model):
    served = make(model)
    seen = []
    served.submit(request(model, LONG), lambda _: seen.append(served.stats()))
    while served.step():
        pass
    assert seen[0].running == 1
    assert seen[0].pages_used == -(-(len(model.tokenization.encode(LONG)) + 1) // 64)
    assert 0 < seen[0].cache_bytes < seen[0].full_cache_bytes
    assert served.stats().finished == 1
    assert isinstance(served.stats(), engine.Stats)

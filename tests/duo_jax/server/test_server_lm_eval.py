"""lm-evaluation-harness over HTTP: what its own clients measure is what is measured in-process.

By default test_server_completions.py compares scores and texts with those in Python, and
test_lm_eval.py those in Python with the harness's own model.
"""

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytest.importorskip("tenacity", reason="its clients for servers are not installed")

from duo_jax.checkpoints import pretrained
from duo_jax.evaluate.harness.flags import LmEvalFlags

pytestmark = pytest.mark.slow
PAIRS = [
    ("Passkey first function arguments.\nPasskey first", " function arguments"),
    ("Passkey first function arguments.\nPasskey first", " method called"),
    ("", "The class statement"),
    ("é 你好 🎉", " é 你"),
    ("Return the value of the named attribute of object. " * 12, "Return"),
]
GENERATE = {"until": ["\n\n", "never"], "max_gen_toks": 12, "temperature": 0.0, "do_sample": False}


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


LIKELY = "Passkey first function arguments.\nPasskey first"  # goes on as the model would


@pytest.fixture(scope="module")
def inside(model):
    from duo_jax.evaluate.harness.model import DuoLM

    return DuoLM(model, LmEvalFlags(max_length=512))


@pytest.fixture(scope="module")
def over_http(served):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def make(**settings):
        return LocalCompletionsAPI(
            model="demo",
            base_url=f"{served.url}/v1/completions",
            max_length=512,
            max_retries=1,
            **settings,
        )

    return make


def with_tokenizer(make, **settings):
    folder = str(pretrained.resolve("demo"))
    return make(tokenizer=folder, tokenizer_backend="huggingface", add_bos_token=True, **settings)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_those_of_the_process(model, inside, over_http, batch_size):
    outside = with_tokenizer(over_http, batch_size=batch_size)
    [likely] = model.generate([LIKELY], max_new_tokens=4)
    pairs = [*PAIRS, (LIKELY, likely)]
    expected = inside.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    found = outside.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4)
    assert {greedy for _, greedy in found} == {True, False}


def test_so_are_those_of_whole_texts(inside, over_http):
    # A window of the client has a token less than one of ours: this is one window for both.
    texts = requests("loglikelihood_rolling", [("Return the value of the attribute. " * 9,)])
    [expected] = inside.loglikelihood_rolling(texts, disable_tqdm=True)
    [found] = with_tokenizer(over_http).loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4 * 90)


@pytest.mark.parametrize("concurrent", [1, 3])
def test_texts_are_those_of_the_process(inside, over_http, concurrent):
    asked = [(context, GENERATE) for context, _ in PAIRS if context]
    expected = inside.generate_until(requests("generate_until", asked), disable_tqdm=True)
    outside = with_tokenizer(over_http, num_concurrent=concurrent)
    found = outside.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == expected
    assert any(found)


def test_the_servers_tokenizer_will_do(over_http, model):
    outside = over_http(tokenizer_backend="auto")
    assert outside.tokenizer_backend == "remote"
    assert outside.eos_string == "<|end|>"
    text = "Passkey first"
    assert outside.tok_encode(text) == model.tokenizer(text, add_special_tokens=False)["input_ids"]
    pair = requests("loglikelihood", PAIRS[:1])
    [(found, greedy)] = outside.loglikelihood(pair, disable_tqdm=True)
    assert found < 0
    assert type(greedy) is bool


def test_chats_are_answered_as_in_the_process(inside, served):
    from lm_eval.models.openai_completions import LocalChatCompletion

    outside = LocalChatCompletion(
        model="demo", base_url=f"{served.url}/v1/chat/completions", max_retries=1
    )
    chats = [
        [{"role": "user", "content": "Passkey one?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Return"}],
    ]

    def written(lm):
        asked = [(lm.apply_chat_template(chat), GENERATE) for chat in chats]
        return lm.generate_until(requests("generate_until", asked), disable_tqdm=True)

    assert written(outside) == written(inside)

"""Our model for lm-evaluation-harness, on tiny random models in float32."""

import dataclasses
import functools
import importlib.util
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers.processors import TemplateProcessing

from duo_jax.api import DuoModel, load
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.evaluate.harness.flags import LmEvalFlags
from duo_jax.heads.pattern import Pattern
from duo_jax.model.llama import hidden_states, logits
from duo_jax.session.session import Session
from tests import models
from train.gates import self_mixed_attention

pytestmark = pytest.mark.usefixtures("offline")
HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_HF = HAS_TORCH and importlib.util.find_spec("accelerate") is not None
needs_hf = pytest.mark.skipif(not HAS_HF, reason="lm-eval's hf model needs torch and accelerate")

TASKS = pathlib.Path("tests/duo_jax/evaluate/lm_eval_tasks")
NAMES = ["local_choose_passkey", "local_say_passkey", "local_texts"]
CONTEXT = "Here is a long text with passkeys hidden in it. Remember them. The passkey is"
GATES = Pattern(gates=np.zeros((1, 2)), sink_size=2, recent_size=4)


@functools.cache
def plain(folder: pathlib.Path) -> DuoModel:
    """Load with full caches; the sizes that nothing depends on let programs be shared."""
    return load(folder, pattern="none", sink_size=2, recent_size=4, prefill_chunk=16)


@functools.cache
def split(folder: pathlib.Path, *, layers: int = 1, sparsity: float = 1.0, **settings) -> DuoModel:
    pattern = dataclasses.replace(GATES, gates=np.zeros((layers, 2)))
    return load(folder, pattern=pattern, sparsity=sparsity, **({"prefill_chunk": 16} | settings))


def duo_lm(model: DuoModel, **flags):
    from duo_jax.evaluate.harness.model import DuoLM

    return DuoLM(model, LmEvalFlags(**flags))


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


def asked(lm) -> dict[str, list]:
    """Run the tasks; return the harness's samples by task."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return evaluate(lm, manager.load(NAMES), bootstrap_iters=0)["samples"]


@needs_hf
@pytest.mark.parametrize(
    ("sparsity", "decode_last"), [(0.0, 5), pytest.param(None, 50, marks=pytest.mark.slow)]
)
def test_equals_the_harness_s_own_model(tiny_model, sparsity, decode_last):
    """Options, texts and perplexities; contexts and texts that are too long; full caches."""
    from lm_eval.models.huggingface import HFLM

    theirs = asked(HFLM(pretrained=str(tiny_model), device="cpu", dtype="float32", batch_size=1))
    model = plain(tiny_model) if sparsity is None else split(tiny_model, sparsity=sparsity)
    ours = asked(duo_lm(model, decode_last=decode_last, batch_size=4))
    for name in NAMES:
        assert len(ours[name]) == len(theirs[name]) == 4
        for our, their in zip(ours[name], theirs[name], strict=True):
            assert our["arguments"] == their["arguments"]
            _assert_same(our["resps"], their["resps"])


def _assert_same(ours: list, theirs: list) -> None:
    for [our], [their] in zip(ours, theirs, strict=True):
        if isinstance(their, str):
            assert our == their
            assert our  # or nothing would have been compared
        else:
            np.testing.assert_allclose(np.float64(our), np.float64(their), rtol=2e-6, atol=2e-5)


def masked_logprobs(folder: pathlib.Path, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Score in one forward pass of the unsplit model, every head behind the streaming mask."""
    config = pretrained.load_config(folder)
    params = pretrained.load_params(folder)
    rows = [context + new for context, new in pairs]
    longest = max(map(len, rows))  # what follows a row's end changes nothing before it
    tokens = jnp.array([row + [0] * (longest - len(row)) for row in rows])

    @jax.jit
    def logprobs(tokens):
        sizes = {"sink_size": GATES.sink_size, "recent_size": GATES.recent_size}
        x, _ = hidden_states(
            config,
            params,
            tokens,
            attend=self_mixed_attention(**sizes),
            layer_inputs=jnp.zeros((1, 2)),
        )
        return jax.nn.log_softmax(logits(config, params, x))

    return [
        sum(float(row[len(context) - 1 + i, token]) for i, token in enumerate(new))
        for row, (context, new) in zip(np.asarray(logprobs(tokens)), pairs, strict=True)
    ]


@pytest.mark.slow
def test_streaming_heads_score_as_behind_their_mask(tiny_model):
    texts = [(CONTEXT, " alpha bravo"), (CONTEXT, " charlie"), ("", "delta echo foxtrot")]
    streaming, full = (
        duo_lm(model, decode_last=7, batch_size=4)
        for model in (split(tiny_model), plain(tiny_model))
    )
    given = requests("loglikelihood", texts)
    found = [logprob for logprob, _ in streaming.loglikelihood(given, disable_tqdm=True)]
    tokens = [(full.tok_encode(c) or [full.prefix_token_id], full.tok_encode(n)) for c, n in texts]
    expected = masked_logprobs(tiny_model, tokens)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-5)
    unmasked = [logprob for logprob, _ in full.loglikelihood(given, disable_tqdm=True)]
    # The last text fits into sinks and recent tokens.
    changed = np.abs(np.subtract(found, unmasked))
    assert (changed > 0.1).tolist() == [True, True, False]
    small, large = streaming.largest_cache, full.largest_cache
    assert small.row_bytes < large.row_bytes  # 6 slots instead of 64
    assert streaming.get_model_info()["cache_bytes_per_row"] == small.row_bytes


def score(model: DuoModel, context: str, **flags) -> float:
    given = requests("loglikelihood", [(context, " alpha bravo")])
    [(logprob, _)] = duo_lm(model, **flags).loglikelihood(given, disable_tqdm=True)
    return logprob


@pytest.mark.slow  # test_serve.py compares chunks that are seen whole with their mask
def test_what_is_decoded_sees_less_than_a_chunk(tmp_path):
    """What tokens before it have seen shows in a second layer."""
    raw = models.llama(vocab_size=400, max_position_embeddings=64)
    folder = models.write_tokenizer(models.write_hf(tmp_path, raw), vocab_size=400)
    chunk = split(folder, layers=2, prefill_mode="chunk", prefill_chunk=64)
    exact = score(split(folder, layers=2), CONTEXT, decode_last=0)
    assert score(chunk, CONTEXT, decode_last=63) == pytest.approx(exact, abs=2e-5)
    assert abs(score(chunk, CONTEXT, decode_last=0) - exact) > 0.01
    assert abs(score(chunk, CONTEXT, decode_last=2) - exact) > 0.01


@pytest.mark.slow
def test_contexts_are_cut_on_the_left_or_in_the_middle(tiny_model):
    lm = duo_lm(split(tiny_model), max_length=20)
    tokens = lm.tok_encode(CONTEXT * 2)
    expected = {"left": tokens[-20:], "middle": tokens[:10] + tokens[-10:]}
    for side, kept in expected.items():
        cut = duo_lm(split(tiny_model), max_length=20, truncate=side)._cut(tokens, 0)
        assert cut == kept
    sides = [score(split(tiny_model), CONTEXT * 2, max_length=20, truncate=s) for s in expected]
    assert abs(sides[0] - sides[1]) > 0.01
    with pytest.raises(InputError, match="leave no room"):
        lm._cut(tokens, 20)


def written(model: DuoModel, gen_kwargs: dict, **flags) -> str:
    given = requests("generate_until", [(CONTEXT, {"max_gen_toks": 8} | gen_kwargs)])
    return duo_lm(model, **flags).generate_until(given, disable_tqdm=True)[0]


@pytest.mark.slow
@needs_hf
def test_special_tokens_end_a_text_as_in_the_harness_s_own_model(tiny_model, tmp_path):
    """A task's `until` may name one; the model here writes <s> in most of its texts."""
    from lm_eval.models.huggingface import HFLM

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0] *= 3  # <s>
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    contexts = [CONTEXT, "Take note:", "What is the passkey?", "alpha bravo", "the vault", "zulu"]
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    ours, texts = duo_lm(plain(folder)), []
    for until in (["<s>"], ["s>"], ["not there"]):
        given = [(text, {"until": until, "max_gen_toks": 12}) for text in contexts]
        their, our = (
            model.generate_until(requests("generate_until", given), disable_tqdm=True)
            for model in (theirs, ours)
        )
        assert our == their
        texts.append(our)
    assert texts[0] == texts[1]
    assert sum(one != other for one, other in zip(texts[0], texts[2], strict=True)) > 2


@pytest.mark.slow
def test_tokens_are_evicted_once_and_after_the_question(tiny_model):
    """As a served text's are: what is decoded one by one would not have voted."""
    from duo_jax.evaluate.harness import continuations

    runtime = split(tiny_model, sparsity=0.5, keep=0.5).runtime
    tokens = list(range(2, 2 + 56))
    session = continuations.read(runtime, [tokens], decode_last=20, room=8)
    served = Session(runtime)
    served.append([tokens], room=8)
    assert list(session.decode(max_new_tokens=2)) == list(served.decode(max_new_tokens=2))
    [kept] = session.cache.kept.tolist()
    assert kept == served.cache.kept.tolist()[0] < 56
    for one, other in zip(*map(jax.tree.leaves, (session.cache, served.cache)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_generation_arguments(tiny_model):
    model = split(tiny_model)
    free = written(model, {})
    assert len(free) > 6
    assert written(model, {"until": [free[4:6], ""]}) == free[:4]
    assert written(model, {"max_gen_toks": 3}) == free[: len(written(model, {"max_gen_toks": 3}))]
    assert written(model, {"do_sample": False, "temperature": 5.0, "num_beams": 1}) == free
    assert written(model, {"do_sample": True, "temperature": 5.0}) != free
    assert written(model, {"temperature": 5.0, "top_k": 1}) == free
    for wrong in (
        {"num_beams": 4},
        {"no_repeat_ngram_size": 2},
        {"max_gen_toks": 0},
        {"max_gen_toks": "abc"},
        {"temperature": "hot"},
    ):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}|abc|hot"):
            written(model, wrong)


def test_chat_template_and_special_tokens(tiny_model):
    model = load(tiny_model, pattern="none")
    lm = duo_lm(model)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    with pytest.raises(InputError, match="no chat template"):
        lm.apply_chat_template(messages)
    model.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    assert lm.apply_chat_template(messages) == "<s>[Hello]>"
    bos = model.tokenizer.bos_token_id
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    for text in ("Hello", "<s>[Hello]>"):
        assert lm.tok_encode(text).count(bos) == 1
    assert bos not in lm.tok_encode("Hello", add_special_tokens=False)
    with pytest.raises(InputError, match="refuses this: no system role"):
        lm.apply_chat_template(messages[:1])
    begun = [*messages, {"role": "assistant", "content": "The answer is"}]  # a task's gen_prefix
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "<s>[Hello][The answer is"


def test_model_arguments_as_lm_eval_parses_them(tiny_model):
    from lm_eval.api.registry import get_model

    import duo_jax.evaluate.lm_eval_model  # noqa: F401 (registers the model)

    duo = get_model("duo_jax")
    # The folder has no pattern of its own: without one, loading fails.
    lm = duo.create_from_arg_string(
        f"model={tiny_model},pattern=none,decode_last=3,sparsity=0",
        {"batch_size": "2", "device": "cuda:0", "max_batch_size": None},
    )
    info = lm.get_model_info()
    assert (info["pattern"], info["sparsity"]) == ("none", 0.0)
    assert (info["decode_last"], info["batch_size"]) == (3, 2)
    for wrong in ("pretrained=x", "model=demo,sparsity=half", "model=demo,batch_size=auto"):
        with pytest.raises(InputError, match=wrong.rpartition(",")[2].partition("=")[0]):
            duo.create_from_arg_string(wrong)

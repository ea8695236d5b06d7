"""duo_jax.load and what it returns: text in, text out, on tiny random models and on the demo."""

import dataclasses
import importlib.metadata
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert.__main__ as converter
import duo_jax
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, save_pattern
from duo_jax.heads.split import split_params
from duo_jax.session import session as session_module
from duo_jax.session.runtime import Runtime
from tests import models

VOCAB = 400
# One layer compiles faster; test_sparsity_or_threshold_decides has two.
RAW = models.llama(
    vocab_size=VOCAB, num_attention_heads=8, num_key_value_heads=8, head_dim=8,
    num_hidden_layers=1, max_position_embeddings=256,
)  # fmt: skip
GATES = np.array([[0.9, 0.2, 0.4, 0.1, 0.3, 0.8, 0.7, 0.6]])
PATTERN = Pattern(gates=GATES, sink_size=4, recent_size=8)
TEXT = "Here is a long text with passkeys hidden in it. Remember them. Take note: alpha bravo. "
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = models.write_hf(tmp_path_factory.mktemp("model") / "tiny", RAW)
    models.write_tokenizer(folder, vocab_size=VOCAB)
    save_pattern(PATTERN, folder / "pattern")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return duo_jax.load(folder, prefill_chunk=16)


@pytest.fixture(scope="module")
def chat_model(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return duo_jax.load(copy, prefill_chunk=16)


@pytest.fixture(scope="module")
def text(model):
    """What the model writes after TEXT."""
    [text] = model.generate([TEXT], max_new_tokens=30)
    assert len(text) > 20
    return text


def heads_of(model) -> tuple[int, ...]:
    return model.config.retrieval_counts


def test_the_public_names_are_there():
    assert set(duo_jax.__all__) == {
        "load", "DuoModel", "Conversation", "SamplingConfig", "Pattern", "load_pattern",
        "save_pattern", "DuoConfig", "InputError", "__version__",
    }  # fmt: skip
    assert all(hasattr(duo_jax, name) for name in duo_jax.__all__)


@pytest.mark.parametrize("installed", [True, False])
def test_the_version_is_that_of_the_package(monkeypatch, installed):
    def version(name):
        if installed:
            return {"duo_jax": "1.2.3"}[name]
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", version)
        importlib.reload(duo_jax)
    assert duo_jax.__version__ == ("1.2.3" if installed else "0+not.installed")
    importlib.reload(duo_jax)


# Loading: folders, patterns, sizes


def test_a_folder_brings_its_own_pattern(model):
    assert heads_of(model) == (4,)  # the highest gates of eight
    assert (model.config.sink_size, model.config.recent_size) == (4, 8)
    assert model.runtime.dtype == np.float32


def test_a_pattern_may_be_a_folder_or_an_object(model, folder, tmp_path):
    all_alike = Pattern(gates=np.full((1, 8), 0.5), sink_size=2, recent_size=9)
    save_pattern(all_alike, tmp_path / "other")
    other = duo_jax.load(folder, pattern=tmp_path / "other")
    assert (other.config.sink_size, other.config.recent_size) == (2, 9)
    assert duo_jax.load(folder, pattern=str(tmp_path / "other")).config == other.config
    assert duo_jax.load(folder, pattern=PATTERN).config == model.config


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory) -> pathlib.Path:
    raw = models.llama(vocab_size=VOCAB, num_key_value_heads=4)
    folder = models.write_hf(tmp_path_factory.mktemp("model") / "two", raw)
    models.write_tokenizer(folder, vocab_size=VOCAB)
    pattern = Pattern(gates=GATES.reshape(2, 4), sink_size=4, recent_size=8)
    save_pattern(pattern, folder / "pattern")
    return folder


@pytest.mark.parametrize(
    ("choice", "heads"),
    [
        ({"sparsity": 0.0}, (4, 4)),
        ({}, (1, 3)),  # the four highest gates of eight
        ({"sparsity": 0.25}, (2, 4)),
        ({"sparsity": 1.0}, (0, 0)),
        ({"threshold": 0.65}, (1, 2)),
        ({"threshold": 0.0}, (4, 4)),
        ({"pattern": "none"}, (4, 4)),
        ({"pattern": "none", "sparsity": 0.0}, (4, 4)),
    ],
)
def test_sparsity_or_threshold_decides(two_layers, choice, heads):
    assert heads_of(duo_jax.load(two_layers, **choice)) == heads


@pytest.mark.parametrize("sizes", [{"sink_size": 1}, {"recent_size": 3}])
def test_sink_and_recent_override_the_pattern(model, folder, sizes):
    """And change what is written: test_flags_change_the_text in test_generate_cli.py."""
    other = duo_jax.load(folder, prefill_chunk=16, **sizes)
    assert other.config == dataclasses.replace(model.config, **sizes)


@pytest.mark.slow
def test_the_prefill_chunk_matters_to_chunk_mode_only(folder, model):
    def text(model):
        return model.generate([TEXT + "Take note."], max_new_tokens=30)

    whole = duo_jax.load(folder)
    assert whole.runtime.prefill_chunk == 8192
    assert text(whole) == text(model)
    chunks = duo_jax.load(folder, prefill_chunk=16, prefill_mode="chunk")
    assert text(chunks) != text(model)
    one_chunk = duo_jax.load(folder, prefill_mode="chunk")
    assert text(one_chunk) != text(chunks)


@pytest.mark.slow
def test_dtype_is_that_of_weights_and_cache(folder):
    half = duo_jax.load(folder, prefill_chunk=16, dtype="bfloat16")
    leaves = jax.tree.leaves(half.params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    conversation = half.conversation()
    conversation.append(TEXT)
    assert conversation.session.cache.layers[0].full[0].keys.dtype == jnp.bfloat16
    float32 = duo_jax.load(folder, prefill_chunk=16).conversation()
    float32.append(TEXT)
    assert conversation.cache_bytes()[0] == float32.cache_bytes()[0] / 2
    assert conversation.generate(max_new_tokens=8)


def test_stored_half_precision_is_float32_on_a_cpu(tmp_path):
    folder = models.write_hf(tmp_path, RAW, dtype="bfloat16")
    models.write_tokenizer(folder, vocab_size=VOCAB)
    assert duo_jax.load(folder, pattern="none").runtime.dtype == np.float32


def test_a_converted_checkpoint_is_the_same_model(folder, model, tmp_path):
    converter.main([str(folder), str(tmp_path / "converted")])
    converted = duo_jax.load(tmp_path / "converted", pattern=PATTERN)
    assert converted.config == model.config
    assert converted.runtime.weights_digest == model.runtime.weights_digest


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["llama, multi-query, biases", "qwen3, norms on q and k"])
def test_split_parameters_are_those_of_split_params(tmp_path, name):
    raw = models.CASES[name]
    folder = models.write_hf(tmp_path, raw, dtype="bfloat16")
    config = pretrained.load_config(folder)
    heads = np.zeros((config.num_layers, config.num_kv_heads), bool)
    heads[0, -1] = True
    for dtype in (None, np.float32):
        ours = pretrained.load_split_params(folder, heads, dtype=dtype)
        theirs = split_params(config, pretrained.load_params(folder, dtype=dtype), heads)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for mine, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            assert mine.dtype == other.dtype
            assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.5, "threshold": 0.5}, "a sparsity or a threshold, not both"),
        ({"pattern": "none", "sparsity": 0.5}, "without a pattern there is no sparsity"),
        ({"pattern": "none", "threshold": 0.0}, "without a pattern there is no sparsity"),
        ({"sparsity": 1.5}, r"sparsity 1.5 is not a number from 0 to 1"),
        ({"pattern": "/nowhere"}, "/nowhere/.* does not exist"),
        (
            {"pattern": Pattern(gates=GATES[:, :4], sink_size=4, recent_size=8)},
            "pattern has 1 layers x 4 KV heads, the model has 1 x 8",
        ),
        ({"sink_size": -1}, "sink_size -1 is not"),
        ({"recent_size": 0}, "recent_size 0 is not"),
        ({"prefill_chunk": 0}, "prefill_chunk 0 is not"),
        ({"sparsity": "x"}, r"sparsity 'x' is not a number from 0 to 1"),
        ({"sparsity": True}, "sparsity True is not a number"),
        ({"threshold": float("nan")}, "threshold nan is not a number from 0 to 1"),
        ({"sink_size": 1.5}, "sink_size 1.5 is not a whole number"),
        ({"recent_size": 2**31 - 1}, "add up beyond int32"),
        ({"prefill_chunk": 2.5}, "prefill_chunk 2.5 is not a whole number"),
        ({"pattern": 3}, "pattern 3 is neither a text nor a path"),
        ({"dtype": "x"}, "dtype 'x' is no floating type"),
        ({"dtype": int}, "is no floating type"),
        ({"weights": 3}, "weight format 3 is not one of"),
        ({"kv": []}, r"KV format \[\] is not one of"),
        ({"implementation": None}, "implementation None is not one of"),
        ({"prefill_mode": "fast"}, "prefill mode 'fast' is not one of exact, chunk"),
    ],
)
def test_settings_that_cannot_be_used(folder, settings, message):
    with pytest.raises(InputError, match=message):
        duo_jax.load(folder, **settings)


@pytest.mark.slow
@pytest.mark.usefixtures("unhooked")
def test_numbers_of_numpy_are_numbers(folder):
    model = duo_jax.load(
        folder,
        sparsity=np.float32(0.5),
        sink_size=np.int64(4),
        recent_size=np.int32(8),
        prefill_chunk=np.int64(16),
    )
    assert dataclasses.astuple(model.config)[-2:] == (4, 8)
    settings = {"max_new_tokens": np.int64(2), "seed": np.uint32(3), "top_k": np.int32(2)}
    text = model.conversation(max_len=np.int64(100)).generate(TEXT[:20], **settings)
    plain = model.generate([TEXT[:20]], max_new_tokens=2, seed=3, top_k=2)
    assert [text] == plain


def test_models_that_cannot_be_used(tmp_path):
    folder = models.write_hf(tmp_path / "bare", RAW)
    with pytest.raises(InputError, match=r"has no pattern of its own.*none"):
        duo_jax.load(folder)
    with pytest.raises(InputError, match="has no tokenizer"):
        duo_jax.load(folder, pattern="none")
    with pytest.raises(InputError, match="neither a folder nor a hub name"):
        duo_jax.load("nowhere")
    (folder / "config.json").write_text(json.dumps(RAW | {"model_type": "mamba"}))
    with pytest.raises(InputError, match="mamba"):
        duo_jax.load(folder, pattern="none")


def test_runtime_refuses_what_load_refuses(model):
    with pytest.raises(InputError, match="prefill_chunk -1"):
        Runtime(config=model.config, params=model.params, prefill_chunk=-1)


# Text


def test_a_list_of_prompts_equals_each_alone(model, text):
    prompts = [TEXT, "What is", TEXT[:40]]
    together = model.generate(prompts, max_new_tokens=30)
    assert together[0] == text
    assert together == [model.generate([prompt], max_new_tokens=30)[0] for prompt in prompts]


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("kind", [iter, tuple, np.array, lambda texts: (text for text in texts)])
def test_prompts_may_come_from_anything_that_yields_texts(model, kind):
    prompts = [TEXT[:40], "What is"]
    expected = model.generate(prompts, max_new_tokens=4)
    assert model.generate(kind(prompts), max_new_tokens=4) == expected


def test_streamed_pieces_are_the_text(model, text):
    pieces = list(model.stream(TEXT, max_new_tokens=30))
    assert len(pieces) > 2
    assert "".join(pieces) == text


@pytest.mark.parametrize("width", [1, 5])
def test_a_stop_string_is_cut_off_and_nothing_follows_it(model, text, width):
    windows = [text[i : i + width] for i in range(len(text) - width + 1)]
    start, stop = next(
        (i, window)
        for i, window in enumerate(windows)
        if i > 2 and window.isascii() and windows.index(window) == i
    )
    assert model.generate([TEXT, "What"], max_new_tokens=30, stop=stop)[0] == text[:start]
    conversation = model.conversation()
    pieces = list(conversation.stream(TEXT, max_new_tokens=30, stop=["not there", stop]))
    assert "".join(pieces) == text[:start]
    [tokens], prompt = conversation.session.tokens, len(model.tokenizer(TEXT)["input_ids"])
    assert stop in model.tokenizer.decode(tokens[prompt:])
    assert stop not in model.tokenizer.decode(tokens[prompt:-1])
    answer = conversation.generate(" What is it?", max_new_tokens=12)
    fresh = model.conversation()
    fresh.session.append([tokens])
    assert fresh.generate(" What is it?", max_new_tokens=12) == answer


def test_text_of_many_bytes_streams_in_whole_characters(model, monkeypatch):
    """A model that writes "é😀" over and over, one byte per token."""
    spelled = model.tokenizer("é😀", add_special_tokens=False)["input_ids"]
    assert len(spelled) == 6
    embedding = np.zeros((VOCAB, RAW["hidden_size"]), np.float32)
    embedding[:, 5] = 1  # whatever is not spelled is followed as its last byte is
    head = np.zeros(embedding.shape[::-1], np.float32)
    for i, token in enumerate(spelled):
        embedding[token] = np.eye(RAW["hidden_size"])[i]
        head[i, spelled[(i + 1) % 6]] = 1
    params = {
        **model.params,
        "embed_tokens": {"embedding": jnp.asarray(embedding)},
        "lm_head": {"kernel": jnp.asarray(head)},
        "layers": jax.tree.map(jnp.zeros_like, model.params["layers"]),
    }
    runtime = dataclasses.replace(model.runtime, params=params)
    endless = dataclasses.replace(model, runtime=runtime)
    assert "".join(endless.stream(TEXT, max_new_tokens=20)) == "é😀é😀é😀é"
    monkeypatch.setattr(session_module, "_SEGMENT_SECONDS", 0.0)  # a token at a time
    pieces = list(endless.stream(TEXT, max_new_tokens=8))
    assert pieces == ["", "é", "", "", "", "😀", "", "é", ""]
    [cut_off] = endless.generate([TEXT], max_new_tokens=10)
    assert cut_off == "é😀é\N{REPLACEMENT CHARACTER}"


def test_progress_counts_the_tokens_of_the_prompt(model):
    calls = []
    model.generate([TEXT], max_new_tokens=1, progress=lambda *done: calls.append(done))
    total = len(model.tokenizer(TEXT)["input_ids"])
    assert calls == [(min(done, total), total) for done in range(16, total + 16, 16)]


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("a text", {}, "prompts must be a list of texts"),
        ([], {}, "there is no prompt"),
        (["a", ""], {}, "the prompt is empty"),
        (["a " * 400], {}, "tokens are too many: the model's range is 256"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens 0 is not a whole number from 1"),
        (["a"], {"temperature": -1.0}, "temperature -1.0"),
        (["a"], {"stop": [""]}, "a stop string is empty"),
        (["a"], {"temprature": 1.0}, "no setting 'temprature'; of sampling: temperature, top_k"),
        (["a"], {"progress": 5}, "progress 5 is no function"),
        ({"a": 1}, {}, "prompts must be a list of texts"),
        (b"ab", {}, "prompts must be a list of texts"),
        (iter(()), {}, "there is no prompt"),
        (iter(["a", ""]), {}, "the prompt is empty"),
        (3, {}, "prompts must be a list of texts"),
        (np.array("a"), {}, "prompts must be a list of texts"),
        (["a", 3], {}, "a text is needed, not 3"),
        (["a"], {"max_new_tokens": "3"}, "max_new_tokens '3' is not a whole number"),
        (["a"], {"stop": 3}, "stop 3 is not a list, each item a text"),
        (["a"], {"stop": [3]}, "stop 3 is not a text"),
        (["a"], {"seed": 2**32}, "seed 4294967296 is not a whole number"),
        (["a"], {"temperature": "hot"}, "temperature 'hot' is not a number from 0"),
    ],
)
def test_texts_that_cannot_be_written(model, prompts, settings, message):
    with pytest.raises(InputError, match=message):
        model.generate(prompts, **settings)


@pytest.mark.usefixtures("unhooked")
def test_a_conversation_refuses_what_generate_refuses_and_keeps_its_text(model):
    conversation = model.conversation()
    conversation.append(TEXT)
    for settings in ({"temprature": 1}, {"progress": "x"}):
        with pytest.raises(
            InputError, match=r"no setting 'temprature'|progress 'x' is no function"
        ):
            conversation.generate(" More.", max_new_tokens=2, **settings)
    assert conversation.num_tokens == len(model.tokenizer(TEXT)["input_ids"])


# Conversations


def test_turns_equal_the_whole_and_cost_only_their_own_tokens(model):
    conversation = model.conversation()
    conversation.append(TEXT)
    answer = conversation.generate(" What is it?", max_new_tokens=12)
    before, tokens = conversation.session.timing.prefill_tokens, conversation.num_tokens
    second = conversation.generate(" And then?", max_new_tokens=12)
    own = len(model.tokenizer(" And then?", add_special_tokens=False)["input_ids"])
    # The last token of the answer was written but not read.
    assert conversation.session.timing.prefill_tokens - before == own + 1
    at_once = model.conversation()
    at_once.session.append([conversation.session.tokens[0][:tokens]])
    assert at_once.generate(" And then?", max_new_tokens=12) == second
    assert model.generate([TEXT + " What is it?"], max_new_tokens=12) == [answer]


@pytest.mark.parametrize("nothing", [None, ""])
def test_writing_goes_on_without_more_text(model, text, nothing):
    conversation = model.conversation()
    tokens = model.tokenizer(TEXT)["input_ids"]
    first = conversation.generate(TEXT, max_new_tokens=11)
    conversation.generate(nothing, max_new_tokens=19)
    whole = model.tokenizer.decode(conversation.session.tokens[0][len(tokens) :])
    assert whole == text
    assert whole.startswith(first.rstrip("\N{REPLACEMENT CHARACTER}"))
    with pytest.raises(InputError, match="the prompt is empty"):
        model.conversation().generate(nothing)


def test_a_conversation_may_have_a_size(model):
    conversation = model.conversation(max_len=64)
    conversation.append(TEXT)
    assert conversation.session.capacity == 64
    used, full = conversation.cache_bytes()
    # 4 of 8 heads keep 64 tokens, the others 4 + 8; keys and values of 8 channels in float32.
    assert (used, full) == (2 * 8 * 4 * (4 * 64 + 4 * 12), 2 * 8 * 4 * 8 * 64)
    with pytest.raises(InputError, match="too many: the cache was made for 64"):
        conversation.append(TEXT * 2)


# Chats


def test_a_chat_is_formatted_by_its_template(chat_model):
    chat = chat_model.conversation()
    chat.tell("Be brief.", role="system")
    answer = "".join(chat.chat("Hello there", max_new_tokens=9))
    prompt = "<s>system: Be brief.</s>\n<s>user: Hello there</s>\n<s>assistant: "
    assert chat_model.tokenizer.decode(chat.session.tokens[0]).startswith(prompt)
    plain = chat_model.conversation()
    encoded = chat_model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    plain.session.append([encoded])
    assert plain.generate(max_new_tokens=9) == answer
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": answer},
    ]


def test_a_second_turn_of_a_chat_costs_only_its_own_tokens(chat_model):
    """Even though the answer's tokens are not those that the tokenizer would choose."""
    chat = chat_model.conversation()
    first = "".join(chat.chat(TEXT, max_new_tokens=20))
    assert len(chat_model.tokenizer(first)["input_ids"]) != 20
    tokens, before = list(chat.session.tokens[0]), chat.session.timing.prefill_tokens
    list(chat.chat("And then?", max_new_tokens=5))
    own = "</s>\n<s>user: And then?</s>\n<s>assistant: "
    own = chat_model.tokenizer(own, add_special_tokens=False)["input_ids"]
    assert chat.session.timing.prefill_tokens - before == len(own) + 1
    assert chat.session.tokens[0][: len(tokens) + len(own)] == tokens + own
    assert chat.messages[1] == {"role": "assistant", "content": first}


def test_a_cut_answer_is_read_again_as_the_messages_say(chat_model):
    """Up to the cut in the tokens that the model chose."""
    whole = "".join(chat_model.conversation().chat(TEXT, max_new_tokens=20))
    chat, stop = chat_model.conversation(), whole[5]
    answer = "".join(chat.chat(TEXT, max_new_tokens=20, stop=[stop]))
    assert stop not in answer
    written = list(chat.session.tokens[0])
    assert stop in chat_model.tokenizer.decode(written).split("assistant: ")[1]
    chat.tell("And then?")
    text = f"<s>user: {TEXT}</s>\n<s>assistant: {answer}</s>\n<s>user: And then?</s>\n"
    [tokens] = chat.session.tokens
    assert chat_model.tokenizer.decode(tokens) == text
    opening = f"<s>user: {TEXT}</s>\n<s>assistant: "
    kept = len(chat_model.tokenizer(opening, add_special_tokens=False)["input_ids"]) + 1
    assert tokens[:kept] == written[:kept]
    again = chat_model.conversation()
    again.session.append([tokens])
    rows = [[*each.session.decode(max_new_tokens=5)] for each in (chat, again)]
    assert rows[0] == rows[1]


def test_an_answer_nobody_wanted_to_the_end_counts(chat_model):
    chat = chat_model.conversation()
    answer = chat.chat("Hello there", max_new_tokens=50)
    heard = next(answer) + next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": heard}
    assert list(chat.chat("And then?", max_new_tokens=5))


def test_chats_and_plain_texts_do_not_mix(model, chat_model):
    with pytest.raises(InputError, match="this model has no chat template"):
        next(model.conversation().chat("Hello"))
    chat = chat_model.conversation()
    chat.tell("Hello")
    with pytest.raises(InputError, match="conversation is a chat"):
        chat.append("text")
    with pytest.raises(InputError, match="message is empty"):
        chat.tell("")
    plain = chat_model.conversation()
    plain.append("text")
    with pytest.raises(InputError, match="conversation is plain text"):
        plain.tell("Hello")
    assert plain.messages == []


def test_a_template_that_refuses(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "tiny")
    (tmp_path / "tiny/chat_template.jinja").write_text("{{ raise_exception('no system please') }}")
    model = duo_jax.load(tmp_path / "tiny")
    with pytest.raises(InputError, match="chat template refuses this: no system please"):
        next(model.conversation().chat("Hello"))

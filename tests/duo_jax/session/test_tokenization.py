"""Tokenizers as their files say; appended texts and turns of chats as the whole has them."""

import io
import json
import pathlib
import sys

import pytest
from tokenizers import Tokenizer

import duo_jax
from duo_jax.checkpoints import tokenizer_files
from duo_jax.errors import InputError
from duo_jax.session.tokenization import Tokenization, check_variables, load_tokenization
from tests import models, sentencepiece_style

every_scheme = pytest.mark.parametrize(
    "scheme", ["first", "always", "legacy", "converted", "divided"]
)
FIRST, SECOND = "The cat sat on the mat.", "\nQuestion: who did it?\nAnswer:"
TEXT = "The cat sat\n\n  on <s>the</s> mat: 世界 😀 é 12."
SAID = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "I am fine."}]
CHAT = [*SAID, {"role": "user", "content": "who did it?"}]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Return a function that loads a tiny model with a tokenizer of a scheme."""
    folder = tmp_path_factory.mktemp("model")
    raw = models.llama(vocab_size=sentencepiece_style.VOCAB, num_hidden_layers=1, eos_token_id=2)
    models.write_hf(folder, raw)

    def load(scheme: str, **settings) -> duo_jax.DuoModel:
        sentencepiece_style.write(folder, scheme)
        return duo_jax.load(folder, pattern="none", **settings)

    return load


# Tokenizers


@pytest.mark.parametrize(
    "name", ["Qwen2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Unknown"]
)
@pytest.mark.parametrize("scheme", ["first", "legacy", "byte-level"])
def test_tokenizer_json_is_read_as_it_is(name, scheme, tmp_path):
    """Whatever class its folder names; Qwen2Tokenizer lost all spaces of SentencePiece's kind."""
    if scheme == "byte-level":
        models.write_tokenizer(tmp_path)
    else:
        sentencepiece_style.write(tmp_path, scheme)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenization = load_tokenization(tmp_path)
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT)
    assert tokenization.encode(TEXT) == expected.ids
    assert tokenization.tokenizer.bos_token == "<s>"
    spaces = tokenization.tokenizer.decode(tokenization.encode("the cat"), skip_special_tokens=True)
    assert spaces.strip() == "the cat"


@pytest.fixture(params=["bpe", "unigram"])
def sentencepiece_folder(request, tmp_path) -> pathlib.Path:
    """Write a folder with tokenizer.model alone, with the settings of Llama 2's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([FIRST, SECOND, "a passkey to the vault", "remember them"] * 9),
        model_writer=written,
        vocab_size=300,
        model_type=request.param,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"unk_token": "<unk>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_sentencepiece_model_alone_is_a_tokenizer(sentencepiece_folder):
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ours = load_tokenization(sentencepiece_folder)
    for text in (FIRST + SECOND, "  two  spaces\n\n\t tabs", "世界 😀 é 12345", "▁x"):
        assert ours.encode(text) == [theirs.bos_id(), *theirs.encode(text)]
    assert ours.encode(FIRST) + ours.encode(SECOND, continues=True) == ours.encode(FIRST + SECOND)
    assert ours.stop_tokens == (theirs.eos_id(),)


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf", "google"])
def test_what_a_sentencepiece_model_needs_is_named(missing, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=r'pip install "duo_jax\[sentencepiece\]"'):
        tokenizer_files.load_tokenizer(tmp_path)


HOSTILE = {
    "no protobuf": (b"\n\xff\xff\xff", "cannot be read as a SentencePiece model"),
    "a long piece": (b"\n\xd4\x0f\n\xd1\x0f" + b"a" * 2001, "a piece of more than 1,000"),
    "too large": (b"\n" * (9 << 20), "has more than 8,388,608 bytes"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_damaged_sentencepiece_model_is_one_line(content, message, tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_files.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


# Texts that go on


@pytest.mark.one_in(2)
@every_scheme
def test_an_appended_text_is_what_the_whole_has_there(scheme, model_of):
    model = model_of(scheme)
    tokens = model.tokenization.encode(FIRST + SECOND)
    assert tokens[0] == model.tokenizer.bos_token_id
    book = model.conversation()
    book.append(FIRST)
    book.append(SECOND)
    assert book.session.tokens == [tokens]
    answer = book.generate(max_new_tokens=5)
    assert [answer] == model.generate([FIRST + SECOND], max_new_tokens=5)


@every_scheme
def test_a_second_turn_is_what_the_whole_has_there(scheme, tmp_path):
    tokenization = load_tokenization(sentencepiece_style.write(tmp_path, scheme))
    whole = tokenization.tokenizer.apply_chat_template(CHAT)["input_ids"]
    before = tokenization.tokenizer.apply_chat_template(SAID)["input_ids"]
    assert whole[: len(before)] == before
    assert tokenization.encode_chat(CHAT, answer=False, before=before) == whole
    # An answer in other tokens than the tokenizer's stays as the model spelled it.
    spelled = [
        *tokenization.tokenizer.apply_chat_template(SAID[:1])["input_ids"],
        *tokenization.tokenizer.convert_tokens_to_ids(["▁I", *"▁am▁fine."]),
    ]
    assert spelled != before[: len(spelled)]
    found = tokenization.encode_chat(CHAT, answer=False, before=spelled)
    rest = tokens_of("</s><s>[INST] who did it? [/INST]", tokenization)
    assert found == [*spelled, *tokens_of(" ", tokenization), *rest]


def tokens_of(text: str, tokenization: Tokenization) -> list[int]:
    return tokenization.encode(text, continues=True)


def test_the_first_turn_is_the_beginning_of_a_text(tmp_path):
    """With the tokenizer's own space, where the template writes no special token first."""
    tokenization = load_tokenization(
        sentencepiece_style.write(tmp_path, chat_template="{{ messages[0].content }}")
    )
    tokens = tokenization.encode_chat([{"role": "user", "content": "the cat"}])
    assert tokenization.tokenizer.convert_ids_to_tokens(tokens)[0] == "▁the"


# Chats


def test_a_system_message_waits_for_the_first_of_the_user(model_of):
    chat = model_of("first").conversation()
    chat.tell("Be brief.", role="system")
    assert chat.num_tokens == 0
    "".join(chat.chat("Hello", max_new_tokens=4))
    expected = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST]"
    tokens = chat._tokenization.tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert chat.session.tokens[0][: len(tokens)] == tokens
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]


def test_a_template_may_insist_on_a_user(model_of):
    model = model_of("first")
    insisting = "{% if messages[-1].role != 'user' %}{{ raise_exception('say something') }}"
    insisting += "{% endif %}{% for m in messages %}{{ m.content }};{% endfor %}"
    model.tokenizer.chat_template = insisting
    chat = model.conversation()
    chat.tell("Be brief.", role="system")
    chat.tell("the cat")
    assert model.tokenizer.decode(chat.session.tokens[0]) == "Be brief.;the cat;"
    model.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match="no system role"):  # and not at every turn
        model.conversation().tell("Be brief.", role="system")


def test_an_empty_system_message_takes_the_place_of_the_template_s(model_of):
    model = model_of("first")
    model.tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}You are helpful.{% endif %}"
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    for system, expected in ((None, "You are helpful.[on]"), ("", "[][on]")):
        chat = model.conversation()
        if system is not None:
            chat.tell(system, role="system")
        chat.tell("on")
        assert model.tokenizer.decode(chat.session.tokens[0]) == expected
    with pytest.raises(InputError, match="the message is empty"):
        model.conversation().tell("")


def test_variables_reach_the_template_and_are_saved(model_of, tmp_path):
    model = model_of("first")
    model.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if think is defined %}{{ think }}{% endif %}"
    )
    chat = model.conversation(chat_template_kwargs={"think": "on the mat"})
    chat.tell("the cat")
    assert model.tokenizer.decode(chat.session.tokens[0]) == "[the cat]on the mat"
    chat.save(tmp_path / "chat")
    assert model.load_conversation(tmp_path / "chat").chat_template_kwargs == {
        "think": "on the mat"
    }
    other = model.load_conversation(tmp_path / "chat", chat_template_kwargs={"think": False})
    other.tell("on")
    assert model.tokenizer.decode(other.session.tokens[0]) == "[the cat][on]False"


def test_what_is_no_variable_is_refused():
    for wrong in (3, "{}", {1: 2}, {"x": object()}, {"x": float("nan")}, {"x": (1,)}):
        with pytest.raises(InputError, match="is not a dict of texts to JSON values"):
            check_variables(wrong)
    deep: list = []
    for _ in range(62):
        deep = [deep]
    for lost, reason in (
        ({"x": deep}, "nested more than 64 deep"),
        ({"x": 10**100}, "a number of 101 digits"),
        ({"x": [1] * 1_000_001}, "more than 1,000,000 values"),
        ({"x": "x" * (8 << 20)}, "characters, above"),
    ):  # a saved conversation could not bring it back
        with pytest.raises(InputError, match=f"chat_template_kwargs .*{reason}"):
            check_variables(lost)
    check_variables({"x": deep[0], "y": 10**99})
    with pytest.raises(InputError, match="cannot hold add_generation_prompt, messages"):
        check_variables({"messages": [], "add_generation_prompt": True})


@every_scheme
def test_a_turn_reads_only_what_is_new(scheme, model_of):
    """The template trims answers and writes <s> before every turn, as Llama 2's does."""
    model = model_of(scheme)
    chat = model.conversation()
    chat.tell("Hello there", answer=True)
    spelled = ["▁I", *"▁am▁fine.", "</s>"]  # not as the tokenizer would
    chat.session.append([model.tokenizer.convert_tokens_to_ids(spelled)])
    chat.messages.append({"role": "assistant", "content": "I am fine."})
    tokens, before = list(chat.session.tokens[0]), chat.session.timing.prefill_tokens
    chat.tell("who did it?", answer=True)
    new = tokens_of(" </s><s>[INST] who did it? [/INST]", model.tokenization)
    assert chat.session.tokens[0] == [*tokens[:-1], *new]
    assert chat.session.timing.prefill_tokens - before == len(new)


class OneTokenForThree:
    def get_vocab(self):
        return {"a": 0, "abc": 1}

    def __call__(self, text, **_):
        return {"input_ids": [1] * (len(text) // 3)}


def test_a_text_beyond_the_model_s_range_is_refused_before_it_is_encoded(monkeypatch):
    monkeypatch.setattr("duo_jax.session.tokenization._LONG_TEXT", 10)
    tokenization = Tokenization(tokenizer=OneTokenForThree(), stop_tokens=(), max_tokens=5)
    assert len(tokenization.encode("abc" * 20)) == 20  # refused where tokens are counted
    with pytest.raises(InputError, match="63 characters are too many: the model's range is 5 tok"):
        tokenization.encode("abc" * 21)

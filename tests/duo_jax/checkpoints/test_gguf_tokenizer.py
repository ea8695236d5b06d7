"""Tokenizers of GGUF files, against transformers' reading of the same files."""

import importlib.util
import json

import pytest

from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.errors import InputError
from duo_jax.evaluate.harness.command import tokenizer_folder
from duo_jax.session.tokenization import load_tokenization
from tests import gguf_files, models
from tests.golden import gguf_tokens

HAS_TORCH = importlib.util.find_spec("torch") is not None
every_tokenizer = pytest.mark.parametrize("name", gguf_tokens.TOKENIZERS)
RAW = models.llama(num_hidden_layers=1, vocab_size=1024)


def write(folder, tokenizer, change=None):
    gguf_files.write(folder / "m.gguf", RAW, tokenizer=tokenizer, change=change)
    return folder / "m.gguf"


@pytest.mark.core
@every_tokenizer
def test_tokens_of_a_page_are_those_of_the_golden_file(tmp_path, name):
    tokenizer = load_tokenizer(gguf_tokens.write(tmp_path, name))
    expected = json.loads(gguf_tokens.FILE.read_text())[name]
    assert tokenizer(gguf_tokens.PAGE)["input_ids"] == expected
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert text.strip() == gguf_tokens.PAGE.strip()


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
@every_tokenizer
def test_tokens_of_a_page_are_those_of_transformers(tmp_path, name):
    file = gguf_tokens.write(tmp_path, name)
    ours = load_tokenizer(file)(gguf_tokens.PAGE)["input_ids"]
    assert ours == gguf_tokens.of_transformers(file)


def test_what_surrounds_the_rules(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, gguf_files.byte_level("qwen2")))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")
    assert tokenizer.pad_token is tokenizer.unk_token is None
    chat = [{"role": "user", "content": "the <|end|>"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "the <|end|>"
    assert tokenizer("<|end|>")["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(tokenizer("<think>")["input_ids"]) == ["<think>"]
    assert tokenizer.decode(tokenizer("<think>")["input_ids"], skip_special_tokens=True)


def test_llama_3_begins_with_bos_where_the_file_does_not_say(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, gguf_files.byte_level("llama-bpe")))
    assert tokenizer("the")["input_ids"][0] == tokenizer.bos_token_id


def test_control_tokens_of_any_letters_are_whole(tmp_path):
    """DeepSeek's are not written in the alphabet of bytes."""

    def add(writer):
        gguf_files.byte_level("qwen2")(writer)
        entries = writer.kv_data[0]
        entries["tokenizer.ggml.tokens"].value[-1] = "<｜end▁of▁turn｜>"
        entries["tokenizer.ggml.token_type"].value[-1] = gguf_files.CONTROL

    tokenizer = load_tokenizer(write(tmp_path, add))
    [token] = tokenizer("<｜end▁of▁turn｜>")["input_ids"]
    assert token == len(tokenizer) - 1


@pytest.mark.parametrize(("prefix", "first"), [(True, "▁the"), (False, "the")])
def test_the_space_in_front_is_the_files_choice(tmp_path, prefix, first):
    file = write(tmp_path, gguf_files.sentencepiece(add_space_prefix=prefix, add_bos_token=False))
    tokenizer = load_tokenizer(file)
    ids = tokenizer("the world")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [first, "▁world"]
    assert tokenizer.decode(ids) == "the world"


def test_ends_of_turns_end_answers(tmp_path):
    file = write(
        tmp_path, gguf_files.byte_level("llama-bpe"), change=lambda w: w.add_eot_token_id(3)
    )
    tokenization = load_tokenization(file)
    assert tokenization.stop_tokens == (3, tokenization.tokenizer.eos_token_id)


def changed(name, value):
    """Return what adds a tokenizer with another value of one entry; None: without it."""

    def add(writer):
        gguf_files.byte_level("qwen2")(writer)
        entries = writer.kv_data[0]
        if value is None:
            del entries[f"tokenizer.ggml.{name}"]
        else:
            entries[f"tokenizer.ggml.{name}"].value = value

    return add


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model", "t5", "tokenizer 't5' is not supported; supported: gpt2, llama"),
        ("pre", "superbpe", "pre-tokenizer 'superbpe' (tokenizer.ggml.pre) is not supported"),
        ("pre", None, "pre-tokenizer None (tokenizer.ggml.pre) is not supported"),
        ("tokens", None, "it has no tokenizer"),
        ("tokens", ["a", "a"], "has the token 'a' twice"),
        ("tokens", ["a", "b"], "it has 2 tokens, but"),
        ("tokens", [str(i) for i in range(2000)], "2,000 tokens, its embedding 1,024"),
        ("token_type", [4], "but 1 values in tokenizer.ggml.token_type"),
        ("merges", None, "it lacks tokenizer.ggml.merges"),
        ("merges", ["a b c"], "the merge 'a b c' is no pair of tokens"),
        ("merges", ["a €"], "is of no tokens in its vocabulary"),
        ("eos_token_id", 5000, "tokenizer.ggml.eos_token_id is 5000, of"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, name, value, said):
    file = write(tmp_path, changed(name, value))
    with pytest.raises(InputError) as error:
        load_tokenizer(file)
    assert said in str(error.value)


def test_a_model_without_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="it has no tokenizer"):
        load_tokenizer(write(tmp_path, None))


def test_scores_must_be_numbers(tmp_path):
    def add(writer):
        gguf_files.sentencepiece()(writer)
        writer.kv_data[0]["tokenizer.ggml.scores"].value[5] = float("nan")

    with pytest.raises(InputError, match="scores are no finite numbers"):
        load_tokenizer(write(tmp_path, add))


def test_the_harness_gets_a_folder_to_load_it_from(tmp_path):
    from transformers import AutoTokenizer

    file = gguf_tokens.write(tmp_path, "llama-bpe")
    (tmp_path / "other").mkdir()
    folder = tokenizer_folder(str(file), str(tmp_path / "other"))
    found = AutoTokenizer.from_pretrained(folder)(gguf_tokens.PAGE)["input_ids"]
    assert found == load_tokenizer(file)(gguf_tokens.PAGE)["input_ids"]

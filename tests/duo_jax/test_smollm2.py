"""A real model, SmolLM2-135M-Instruct, from its GGUF file on: tokens, weights, answers."""

import importlib.util
import json
import pathlib
import re
import shlex

import pytest

import duo_jax
from convert import fetch
from duo_jax import generate
from duo_jax.checkpoints import own_pattern
from duo_jax.checkpoints.gguf import read_config, read_header
from duo_jax.checkpoints.weights import open_weights
from duo_jax.errors import InputError
from duo_jax.heads.pattern import load_pattern
from duo_jax.session.tokenization import load_tokenization
from tests.golden import gguf_tokens, smollm2
from train.identify.flags import default_config

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("unhooked")]
README = pathlib.Path(__file__).parents[2] / "README.md"
PAGE = README.parent / "examples/pass_key.txt"
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def file():
    try:
        return fetch.fetch("smollm2")
    except InputError as error:
        pytest.skip(str(error))


def test_the_file_says_what_it_is(file):
    config = read_config(file)
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.embed_size, config.head_dim, config.vocab_size) == (576, 64, 49_152)
    assert config.tie_embeddings
    assert len(read_header(file).tensors) == 272


def test_tokens_of_a_page(file):
    tokenization = load_tokenization(file)
    tokens = tokenization.encode(gguf_tokens.PAGE)
    assert tokens == json.loads(smollm2.FILE.read_text())["tokens"]
    assert tokenization.tokenizer.decode(tokens) == gguf_tokens.PAGE
    assert tokenization.stop_tokens == (2,)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_the_stored_tokens_are_those_of_transformers(file):
    """Of small files, test_gguf_tokenizer.py asks transformers every time."""
    stored = json.loads(smollm2.FILE.read_text())["tokens"]
    assert stored == gguf_tokens.of_transformers(file)


def test_weights_are_those_that_transformers_reads(file):
    """By digests of some of them; the file has the rows of q and k in another order."""
    expected = json.loads(smollm2.FILE.read_text())["digests"]
    weights = open_weights(file)
    named = {tensor.name: tensor for tensor in weights.tensors}
    found = {
        name: smollm2.digest(named[name].to_hf(weights.read(named[name]))) for name in expected
    }
    assert found == expected


@pytest.mark.slow
def test_it_finds_a_pass_key_beyond_the_window_of_streaming_heads(file):
    """In the 400 tokens of a shorter page than README's, with the pattern that ships."""
    model = duo_jax.load(file, prefill_chunk=256)
    page = PAGE.read_text(encoding="utf-8")
    place, question = page.index("The pass key is 51934"), page.rindex("What is the pass key")
    between = page[place : place + 1600]
    window = model.config.sink_size + model.config.recent_size
    assert len(model.tokenizer(between)["input_ids"]) > window
    conversation = model.conversation()
    answer = conversation.generate(page[:300] + between + page[question:], max_new_tokens=6)
    assert answer == " 51934"
    used, full = conversation.cache_bytes()
    assert used / full == pytest.approx((1024 + window) / 2 / 1024)  # half of the heads stream


@pytest.mark.slow
def test_it_finds_a_pass_key_through_full_caches(file):
    """In about 500 tokens."""
    model = duo_jax.load(file, pattern="none")
    [answer] = model.generate([smollm2.prompt("51934")], max_new_tokens=6)
    assert "51934" in answer


def test_its_pattern_and_presets_ship(file):
    [shipped] = own_pattern.shipped_patterns()
    assert own_pattern.find_pattern(file, read_config(file)) == shipped
    preset = default_config(str(file), file)
    assert (preset.method, preset.data.words, preset.chats) == ("budget", "digits", True)
    pattern = load_pattern(shipped)
    assert (pattern.sink_size, pattern.recent_size) == (preset.sink, preset.recent)


@pytest.mark.slow
def test_it_prints_what_readme_says(file, capsys, monkeypatch):
    """A pass key 700 tokens back, through caches of which half are of streaming heads."""
    monkeypatch.chdir(README.parent)
    text = README.read_text(encoding="utf-8")
    [(command, printed)] = re.findall(r"(python -m duo_jax.*smollm2.*)\n((?:# .*\n)+)```", text)
    words = shlex.split(command)[3:]
    words[words.index("--model") + 1] = str(file)
    generate.main(words)
    said = capsys.readouterr()

    def without_times(text: str) -> str:
        return re.sub(r"[\d.]+ (s|tokens/s)\b", r"_ \1", text)

    shown = re.sub("^# ", "", printed, flags=re.MULTILINE)
    heads, times = said.err.splitlines(keepends=True)
    assert without_times(heads + said.out + times) == without_times(shown)

"""Tokenizers of passkey samples, and samplers that use them."""

import json

import pytest
from transformers import AutoTokenizer

from duo_jax.data.documents import load_documents
from duo_jax.data.passkey_templates import NATO
from duo_jax.data.passkeys import PasskeySampler
from tests import models
from tests.passkeys import SMALL


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return models.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def make(tokenizer):
    """Return a function that makes fresh samplers."""
    documents = load_documents(())[:12]

    def make(config=SMALL, *, seed=0, text=documents, tokenizer=tokenizer, **others):
        return PasskeySampler(config, tokenizer, text, seed=seed, **others)

    return make


@pytest.fixture(scope="session")
def coarse_tokenizer(tmp_path_factory):
    """Return a tokenizer that spells most words: from two to eight tokens each."""
    folder = models.write_tokenizer(tmp_path_factory.mktemp("coarse"), vocab_size=280)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {len(tokenizer(" " + word).input_ids) for word in NATO}
    assert max(sizes) - min(sizes) >= 3
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_with_bos(folder, tmp_path_factory):
    """Return the same tokenizer with the post-processor of Llama, which puts bos in front."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text, pair = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, pair],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    target = tmp_path_factory.mktemp("with-bos")
    (target / "tokenizer.json").write_text(json.dumps(raw))
    (target / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    return AutoTokenizer.from_pretrained(target)

"""Tokenizers from a model's folder: tokenizer.json, or else a SentencePiece model, as they are.

The class that tokenizer_config.json names is not asked, where there is one of these files:
transformers' classes build a tokenizer of their own kind from the vocabulary. Qwen2Tokenizer makes
one that loses all spaces of a SentencePiece-style tokenizer.json, and LlamaTokenizer another one of
a byte-level or a Unigram file.
"""

import importlib.util
import os
import pathlib
from typing import Any

from duo_jax import files
from duo_jax.checkpoints.chat_template_files import check_chat_templates
from duo_jax.errors import InputError

# One of them is needed for a tokenizer; fetched from the hub beside *.json.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
_NEEDED = ("sentencepiece", "google.protobuf")  # to read a SentencePiece model


def load_tokenizer(folder: pathlib.Path) -> Any:
    """Load the tokenizer in `folder`, without touching the network.

    Returns:
      A transformers tokenizer.

    Raises:
      InputError: there are no tokenizer files, or transformers cannot use them.
    """
    if not any(files.exists(folder / file) for file in TOKENIZER_FILES):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model)")
    check_chat_templates(folder)
    as_it_is = files.exists(folder / "tokenizer.json")
    model = folder / "tokenizer.model"
    sentencepiece = not as_it_is and _is_sentencepiece(model)
    if sentencepiece and not all(map(_installed, _NEEDED)):
        raise InputError(
            f"{model} is a SentencePiece model, and {folder} has no tokenizer.json: "
            'pip install "duo_jax[sentencepiece]"'
        )
    # Without PyTorch, transformers warns that it has no models; only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds to import

    kind = PreTrainedTokenizerFast if as_it_is or sentencepiece else AutoTokenizer
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many types, all about the caller's files
        if sentencepiece:  # transformers goes on to try another format, and tells of that one
            raise InputError(f"{model} cannot be read as a SentencePiece model") from None
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {error}") from None


def _is_sentencepiece(model: pathlib.Path) -> bool:
    """Whether a file begins as a SentencePiece model; Llama 3's of this name are plain text."""
    if not files.is_file(model):
        return False
    with files.reading(model), model.open("rb") as file:
        return file.read(1) == b"\n"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False

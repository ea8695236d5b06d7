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
from duo_jax.checkpoints.tokenizer_check import check_tokenizer_files
from duo_jax.checkpoints.tokenizer_class import tokenizer_config
from duo_jax.data import tokenizer_calls
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
_LARGEST_MODEL = 8 << 20  # bytes; one of 256,000 pieces has 4 MB
_LONGEST_PIECE = 1_000  # characters; every place to divide a piece at is looked at
_PROBE = "Hello, world!\n  \N{LATIN SMALL LETTER E WITH ACUTE}\N{SNOWMAN}\N{GRINNING FACE} 12"


def load_tokenizer(folder: pathlib.Path) -> Any:
    """Load the tokenizer in `folder`, without touching the network.

    Returns:
      A transformers tokenizer.

    Raises:
      InputError: there are no tokenizer files, or transformers cannot use them.
    """
    if not any(files.exists(folder / file) for file in TOKENIZER_FILES):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model)")
    check_tokenizer_files(folder, TOKENIZER_FILES)
    check_chat_templates(folder)
    as_it_is = files.exists(folder / "tokenizer.json")
    model = folder / "tokenizer.model"
    sentencepiece = not as_it_is and _is_sentencepiece(model)
    if sentencepiece:
        _check_sentencepiece(model)
    # Without PyTorch, transformers warns that it has no models; only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with tokenizer_calls.without_panic_lines():
            if as_it_is or sentencepiece:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), **local)
            else:
                from transformers import AutoTokenizer  # imports PyTorch where there is one

                config = tokenizer_config(folder)
                tokenizer = AutoTokenizer.from_pretrained(str(folder), config=config, **local)
            _drop_empty_special_tokens(tokenizer)
            _probe(tokenizer)
            return tokenizer
    except BaseException as error:  # of many types, all about the caller's files
        if not isinstance(error, Exception) and not tokenizer_calls.is_panic(error):
            raise  # such as Ctrl-C
        if sentencepiece:  # transformers goes on to try another format, and tells of that one
            raise _damaged(model) from None
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {error}") from None


def _drop_empty_special_tokens(tokenizer: Any) -> None:
    """Treat special tokens that are the empty text as left out: they have no number.

    To find the number of such an unk_token, transformers asks itself without an end.
    """
    verbose, tokenizer.verbose = tokenizer.verbose, False  # it complains of those that are not set
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        if getattr(tokenizer, name) == "":
            setattr(tokenizer, name, None)
    tokenizer.verbose = verbose


def _probe(tokenizer: Any) -> None:
    """Find damage that shows only when a text is encoded and decoded, before hours are spent."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return
    for text in (_PROBE, _PROBE[0]):
        try:
            inner.decode(inner.encode(text).ids)
        except Exception as error:
            if type(error) is not Exception:
                raise
            # It lacks one of these characters, and may have all that it will be asked for.


def _is_sentencepiece(model: pathlib.Path) -> bool:
    """Whether a file begins as a SentencePiece model; Llama 3's of this name are plain text."""
    if not files.present(model):
        return False
    with files.reading(model), model.open("rb") as file:
        return file.read(1) == b"\n"


def _check_sentencepiece(model: pathlib.Path) -> None:
    """Refuse a SentencePiece model that nothing here reads, or that takes long to read.

    Raises:
      InputError: says which.
    """
    if not all(map(_installed, _NEEDED)):
        raise InputError(
            f"{model} is a SentencePiece model, and there is no tokenizer.json beside it: "
            'pip install "duo_jax[sentencepiece]"'
        )
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    with files.reading(model):
        if model.stat().st_size > _LARGEST_MODEL:
            raise InputError(f"{model} has more than {_LARGEST_MODEL:,} bytes")
        content = model.read_bytes()
    # protobuf makes the class when the module is imported, where no type checker sees it.
    found = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        found.ParseFromString(content)
    except DecodeError:
        raise _damaged(model) from None
    if max((len(piece.piece) for piece in found.pieces), default=0) > _LONGEST_PIECE:
        raise InputError(f"{model} has a piece of more than {_LONGEST_PIECE:,} characters")


def _damaged(model: pathlib.Path) -> InputError:
    return InputError(f"{model} cannot be read as a SentencePiece model")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False

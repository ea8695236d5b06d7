"""The tokenizer of a GGUF file, rebuilt from its vocabulary with the tokenizers library.

There are two kinds. "gpt2" is byte-level BPE: the file names the rule by which text is cut before
merges apply, its pre-tokenizer. "llama" is SentencePiece's BPE: the file has a score for every
token, and the merges follow from the scores. Where transformers reads a file's tokenizer, this one
makes the same tokens; it also reads what transformers passes over: add_space_prefix, and tokens
of Llama 3 that merges do not reach.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from duo_jax.checkpoints.chat_template_files import LONGEST_TEMPLATE
from duo_jax.checkpoints.gguf import pre_tokenizers
from duo_jax.checkpoints.gguf.header import Header
from duo_jax.errors import InputError, quoted

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_MAX_ADDED = 4_096  # tokens that are matched before any rule; Mistral Nemo has 1,000
_MAX_TOKENS = 300_000  # Llama 3 has 128,256, Qwen 151,936
_MAX_MERGES = 400_000  # Llama 3 has 280,147
_LONGEST_PIECE = 256  # characters of a token that is merged from others
_MAX_PIECES = 2_000_000  # characters of all of them
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, a turn, a message


def load_tokenizer(header: Header) -> Any:
    """Rebuild the tokenizer of a GGUF file.

    Returns:
      A transformers tokenizer.

    Raises:
      InputError: the file holds no tokenizer of a known kind.
    """
    vocabulary = _Vocabulary(header)
    kind = vocabulary.entry("model")
    if kind not in _BUILDERS:
        raise header.refused(
            f"tokenizer {quoted(kind)} is not supported; supported: {', '.join(_BUILDERS)}"
        )
    # Without PyTorch, transformers warns that it has no models; only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    try:
        return PreTrainedTokenizerFast(
            tokenizer_object=_BUILDERS[kind](vocabulary),
            clean_up_tokenization_spaces=False,
            chat_template=vocabulary.chat_template(),
            name_or_path=str(header.path),  # tells tokenizers apart, in the harness's caches too
            **vocabulary.special,
        )
    except InputError:
        raise
    except Exception as error:  # of many types, all about the file
        raise header.refused(f"its tokenizer cannot be built: {error}") from None


def end_tokens(header: Header) -> list[int]:
    """Return the tokens that end an answer: those of a text, a turn and a message.

    Raises:
      InputError: the file names a token that it does not have.
    """
    vocabulary = _Vocabulary(header)
    found = (vocabulary.token_id(name) for name in _ENDS)
    return sorted({token for token in found if token is not None})


class _Vocabulary:
    """The tokens of a file and what it says about them, checked."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.tokens: list[str] = self._list("tokens", list) or []
        if not self.tokens:
            raise header.refused("it has no tokenizer (tokenizer.ggml.tokens)")
        self.limit(len(self.tokens), _MAX_TOKENS, "tokens")
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            double = next(t for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise header.refused(f"its vocabulary has the token {quoted(double)} twice")
        embedding = header.tensors.get("token_embd.weight")
        if embedding is not None and len(self.tokens) > embedding.shape[0]:
            raise header.refused(
                f"its vocabulary has {len(self.tokens):,} tokens, its embedding "
                f"{embedding.shape[0]:,}"
            )
        self._types = self._list("token_type", np.ndarray)
        for name, values in (("token_type", self._types), ("scores", self.scores())):
            if values is not None and len(values) != len(self.tokens):
                raise header.refused(
                    f"it has {len(self.tokens):,} tokens, but {len(values):,} values in "
                    f"tokenizer.ggml.{name}"
                )
        tokens = {name: self.token_id(entry) for name, entry in _SPECIAL.items()}
        self.special = {name: self.tokens[i] for name, i in tokens.items() if i is not None}

    def entry(self, name: str) -> Any:
        """Return an entry of the tokenizer that is one value; None where the file has none."""
        return self.header.value(f"tokenizer.ggml.{name}")

    def flag(self, name: str, default: bool) -> bool:
        """Return an entry that is true or false."""
        found = self.entry(name)
        if found is not None and not isinstance(found, bool):
            raise self.header.refused(
                f"tokenizer.ggml.{name} is {quoted(found)}, not true or false"
            )
        return default if found is None else found

    def token_id(self, name: str) -> int | None:
        """Return an entry that names a token."""
        found = self.entry(name)
        if found is None or found == 0xFFFFFFFF:  # -1: none
            return None
        if not isinstance(found, int) or not 0 <= found < len(self.tokens):
            raise self.header.refused(
                f"tokenizer.ggml.{name} is {quoted(found)}, of {len(self.tokens):,} tokens"
            )
        return found

    def scores(self) -> np.ndarray | None:
        """Return the score of every token."""
        return self._list("scores", np.ndarray)

    def merges(self) -> list[tuple[str, str]] | None:
        """Return the pairs that are merged, the first ones first."""
        found = self._list("merges", list)
        if found is None:
            return None
        self.limit(len(found), _MAX_MERGES, "merges")
        pairs = [tuple(merge.split(" ", 2)) for merge in found]
        odd = next((i for i, pair in enumerate(pairs) if len(pair) != 2), None)
        if odd is not None:
            raise self.header.refused(f"the merge {quoted(found[odd])} is no pair of tokens")
        for left, right in pairs:
            if left not in self.ids or right not in self.ids or left + right not in self.ids:
                raise self.header.refused(
                    f"the merge {quoted(f'{left} {right}')} is of no tokens in its vocabulary"
                )
        return pairs

    def of_type(self, *types: int) -> list[str]:
        """Return the tokens of some types."""
        if self._types is None:
            return self.tokens if _NORMAL in types else []
        return [self.tokens[i] for i in np.flatnonzero(np.isin(self._types, types))]

    def added(self) -> list[AddedToken]:
        """Return the tokens that are found in a text before any rule applies."""
        special = dict.fromkeys((*self.special.values(), *self.of_type(_CONTROL)), True)
        found = dict.fromkeys(self.of_type(_USER_DEFINED), False) | special
        self.limit(len(found), _MAX_ADDED, "control and user-defined tokens")
        self.limit(sum(map(len, found)), _MAX_ADDED * 64, "characters in these tokens")
        return [
            AddedToken(token, special=is_special, normalized=False)
            for token, is_special in sorted(found.items(), key=lambda item: self.ids[item[0]])
            if token
        ]

    def chat_template(self) -> str | None:
        """Return the chat template."""
        found = self.header.metadata.get("tokenizer.chat_template")
        if found is not None and not isinstance(found, str):
            raise self.header.refused("its chat template is no text")
        if found is not None and len(found) > LONGEST_TEMPLATE:
            raise self.header.refused(
                f"its chat template has {len(found):,} characters, above {LONGEST_TEMPLATE:,}"
            )
        return found

    def limit(self, count: int, most: int, what: str) -> None:
        """Refuse what would take long, and no model has."""
        if count > most:
            raise self.header.refused(f"it has {count:,} {what}, above {most:,}")

    def _list(self, name: str, kind: type) -> Any:
        found = self.header.metadata.get(f"tokenizer.ggml.{name}")
        if found is not None and not isinstance(found, kind):
            raise self.header.refused(f"tokenizer.ggml.{name} is no list of what it should hold")
        return found


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """Return byte-level BPE."""
    name = vocabulary.entry("pre")
    rule = pre_tokenizers.RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise vocabulary.header.refused(
            f"pre-tokenizer {quoted(name)} (tokenizer.ggml.pre) is not supported; supported: "
            f"{', '.join(pre_tokenizers.RULES)}"
        )
    merges = vocabulary.merges()
    if merges is None:
        raise vocabulary.header.refused("it lacks tokenizer.ggml.merges")
    model = models.BPE(vocabulary.ids, merges, ignore_merges=rule.whole_tokens)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = rule.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    _finish(tokenizer, vocabulary, add_bos=rule.add_bos)
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """Return SentencePiece's BPE, with bytes for characters that are no tokens."""
    unknown = vocabulary.special.get("unk_token")
    unknown = unknown or next(iter(vocabulary.of_type(_UNKNOWN)), None)
    merges = vocabulary.merges() or _merges_of_scores(vocabulary)
    prefix = vocabulary.flag("add_space_prefix", True)
    tokenizer = Tokenizer(
        models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.metaspace(prefix=prefix)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*parts, *strip])
    _finish(tokenizer, vocabulary, add_bos=True)
    return tokenizer


def _merges_of_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return every pair of tokens that is a token, the one with the highest score first."""
    scores = vocabulary.scores()
    if scores is None:
        raise vocabulary.header.refused("it lacks tokenizer.ggml.scores")
    if not np.isfinite(scores).all():
        raise vocabulary.header.refused("its tokenizer.ggml.scores are no finite numbers")
    ids = vocabulary.ids
    pieces = [
        (token, score)
        for token, score in zip(vocabulary.tokens, scores.tolist(), strict=True)
        if len(token) <= _LONGEST_PIECE
    ]
    vocabulary.limit(
        sum(len(token) for token, _ in pieces), _MAX_PIECES, "characters in its tokens"
    )
    pairs = (
        (-score, -at, at - len(token), token[:at], token[at:])
        for token, score in pieces
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    )
    found = list(itertools.islice(pairs, _MAX_MERGES + 1))
    vocabulary.limit(len(found), _MAX_MERGES, "merges")
    found.sort(key=lambda pair: pair[:3])  # equal ones in the order of the vocabulary
    return [(left, right) for *_, left, right in found]


def _finish(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, add_bos: bool) -> None:
    """Add what surrounds the rules: whole tokens, and those at the ends of a text."""
    tokenizer.add_tokens(vocabulary.added())
    ends = {}
    for name, default in (("bos", add_bos), ("eos", False)):
        if vocabulary.flag(f"add_{name}_token", default):
            token = vocabulary.special.get(f"{name}_token")
            if token is not None:
                ends[name] = token
            elif vocabulary.entry(f"add_{name}_token"):
                raise vocabulary.header.refused(f"it adds a {name}_token to texts, but has none")
    if ends:
        words = [ends.get("bos"), "$A", ends.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[word for word in words if word],
            special_tokens=[(token, vocabulary.ids[token]) for token in set(ends.values())],
        )


_BUILDERS: dict[str, Callable[[_Vocabulary], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}

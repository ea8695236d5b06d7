"""How byte-level tokenizers cut a text into words, by the names that GGUF files use.

The expressions are those of the models' own tokenizer.json. Names that are not listed are refused:
another rule would make other tokens, and nobody would notice.
"""

import dataclasses

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"


def _cased(*, ending: str, digits: str) -> str:
    """Return the rule that also cuts where a small letter meets a capital one."""
    words = f"{_BEFORE}{_UPPER}*{_LOWER}+{ending}|{_BEFORE}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule and what its models have in common.

    Attributes:
      expression: what a word is; None: GPT-2's, which the tokenizers library has.
      whole_tokens: a word that is a token is not merged from its parts.
      add_bos: a text begins with the BOS token where the file does not say.
    """

    expression: str | None = None
    whole_tokens: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Return the rule as the tokenizers library applies it."""
        if self.expression is None:
            return pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.expression), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )


def metaspace(*, prefix: bool) -> pre_tokenizers.PreTokenizer:
    """Return SentencePiece's rule: a space is a character, and one stands in front of a text."""
    scheme = "first" if prefix else "never"
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


_GPT2 = Rule()
_QWEN2 = Rule(expression=rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+|\p{{N}}|{_REST}")
_LLAMA3_WORDS = rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_LLAMA3 = Rule(expression=_LLAMA3_WORDS, whole_tokens=True, add_bos=True)
_DBRX = Rule(expression=_LLAMA3_WORDS)
_TEKKEN = Rule(expression=_cased(ending="", digits=r"\p{N}"), whole_tokens=True, add_bos=True)
_GPT4O = Rule(expression=_cased(ending=f"{_CONTRACTIONS}?", digits=r"\p{N}{1,3}"))

_NAMES = {
    # Some of these models also split numbers into digits. transformers does not when it reads their
    # files, and neither do we: only runs of spaces in front of a number differ.
    "gpt-2 smollm starcoder refact command-r codeshell exaone exaone4 minerva-7b": _GPT2,
    "mpt olmo jais phi-2 mellum trillion granite-docling gigachat a.x-4.0": _GPT2,
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": _QWEN2,
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": _LLAMA3,
    "dbrx smaug-bpe": _DBRX,
    "tekken": _TEKKEN,
    "gpt-4o llama4 kanana2 talkie minimax-m2": _GPT4O,
}
RULES = {name: rule for names, rule in _NAMES.items() for name in names.split()}

"""The words around passkeys, and the words that passkeys are made of."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from duo_jax.data import tokenizer_calls
from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Many, Template

NATO = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november "
    "oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
).split()

# What stands in place of the defaults with passkeys of digits: SmolLM2-135M answers these.
DIGITS = {
    "passkey_words": 1,
    "intro": "There is important info hidden inside a lot of irrelevant text. Find it and memorize "
    "it.\n\n",
    "needle": "\n\nThe {name} pass key is{passkey}. Remember it.{passkey} is the {name} pass key."
    "\n\n",
    "closing": "\n\n",
    "question": "What is the {name} pass key? The {name} pass key is",
    "separator": ".\n\n",
}

Words = Literal["nato", "vocabulary", "digits"]

_MOST_WORDS = 100_000  # hidden in a text; nobody reads longer texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PasskeyTemplates:
    """The words around a passkey, and the words of it; the defaults are the paper's."""

    num_passkeys: int = 10
    """Passkeys hidden in each sample, and questions at its end, 1 to 20."""
    passkey_words: Many = 32
    """Words of each passkey."""
    words: Words = "nato"
    """Words that passkeys consist of.
    nato: words of the NATO alphabet, with replacement.
    vocabulary: distinct lower-case words of one token each, for very small models.
    digits: distinct numbers of five digits, which small pretrained models recall. A passkey is one
    number then, and the texts that are left at their defaults change: the needle becomes
    "The {name} pass key is{passkey}. Remember it.{passkey} is the {name} pass key."."""
    intro: Template = "Here is a long text with passkeys hidden in it. Remember them.\n<text>\n"
    """Text before the haystack."""
    needle: Template = "\n\nTake note: this is the {name} passkey to the vault:{passkey}.\n\n"
    """Text that hides a passkey in the haystack; {name} is its ordinal, {passkey} its words."""
    closing: Template = "\n</text>\n\n"
    """Text after the haystack."""
    question: Template = (
        "What is the {name} passkey to the vault? The {name} passkey to the vault is:"
    )
    """Text that asks for a passkey; {name} is its ordinal."""
    separator: Template = ".\n\n"
    """Text after an answer."""

    def __post_init__(self) -> None:
        if self.words == "digits":
            take_defaults(self, DIGITS)
        check_fields(self)
        if not 1 <= self.num_passkeys <= len(ORDINALS):
            raise InputError(f"num_passkeys {self.num_passkeys} is not in 1 to {len(ORDINALS)}")
        if "{passkey}" not in self.needle:
            raise InputError("the needle must hold {passkey}")
        words = self.num_passkeys * self.passkey_words * self.needle.count("{passkey}")
        check_words(words, "the passkeys of a text")
        for template in (self.needle, self.question):
            rest = filled(template.replace("{passkey}", ""), "")
            if "{" in rest or "}" in rest:
                raise InputError(
                    f"needle and question may hold {{name}} and no other braces: {quoted(template)}"
                )


def in_words(kind: Words, passkey_words: int) -> str:
    """Say what passkeys are made of."""
    if kind == "digits":
        return "a number" if passkey_words == 1 else f"{passkey_words} numbers"
    return f"{passkey_words} words"


def check_words(words: int, what: str) -> None:
    """Refuse numbers that each are in range but together ask for gigabytes of words.

    Raises:
      InputError: says how many words there may be.
    """
    if words > _MOST_WORDS:
        raise InputError(f"{what} have {words:,} words together; at most {_MOST_WORDS:,} fit")


def take_defaults(config: Any, values: Mapping[str, Any]) -> None:
    """Set the fields of a frozen dataclass that still have the defaults of its class."""
    for field in dataclasses.fields(config):
        if field.name in values and getattr(config, field.name) == field.default:
            object.__setattr__(config, field.name, values[field.name])


def filled(template: str, name: str) -> str:
    """Put an ordinal in the place of {name}.

    Plain replacement: format strings of others could ask for gigabytes ("{name:>2000000000}").
    """
    return template.replace("{name}", name)


def word_list(kind: Words, tokenizer: Any) -> list[str]:
    """Return the words that answers are made of, see `PasskeyTemplates.words`."""
    if kind == "nato":
        return [*NATO]
    if kind == "digits":
        return [str(number) for number in range(10_000, 100_000)]
    words = (tokenizer_calls.decode(tokenizer, [i]) for i in range(len(tokenizer)))
    candidates = sorted({w[1:] for w in words if re.fullmatch(r" [a-z]{3,}", w)})
    return [w for w in candidates if w not in ORDINALS]


def tokens_per_word(
    kind: Words, words: Sequence[str], encode: Callable[[str], list[int]]
) -> tuple[int, int]:
    """Return the fewest and the most tokens that a word takes, with a space before it.

    Args:
      kind: of the words.
      words: `word_list` of this kind.
      encode: turns text into tokens.
    """
    if kind == "digits":  # 90,000 words are not tried: a token per character is the most
        return 1, 1 + len(words[0])
    sizes = [len(encode(" " + word)) for word in words]
    return min(sizes), max(sizes)

"""Log-probabilities as /v1/completions shows them: per token, its text and those of others."""

from collections.abc import Sequence

from duo_jax.engine.request import Request, TokenLogprob
from duo_jax.server.answers import TextLogprobs
from duo_jax.server.service import Service
from duo_jax.session.detokenize import Detokenizer


class Speller:
    """Tells what each token adds to a text, so that the pieces joined are the text.

    The tokens of a character that several spell add nothing but the last, which adds it. Tokens
    that no text shows, such as <s>, add nothing.

    Args:
      service: holds the tokenizer.
      request: whose tokens are spelled.
      echo: the prompt is a part of the text.
    """

    def __init__(self, service: Service, request: Request, *, echo: bool) -> None:
        tokenization = service.engine.model.tokenization
        own = () if request.ignore_eos else tokenization.stop_tokens
        self._ends = {*own, *request.stop_tokens}
        self._vocabulary = service.vocabulary
        self._text = Detokenizer(
            tokenization.tokenizer,
            context=() if echo else request.prompt,
            skip_special_tokens=request.skip_special_tokens,
        )
        self._offset = 0

    def prompt(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], *, last: bool
    ) -> TextLogprobs:
        """Return the entries of the prompt, whose tokens come first; and last, if none follow."""
        texts = [self._text.push([token]) for token in tokens]
        if last and texts:
            texts[-1] += self._text.finish()
        return self._entries(texts, logprobs)

    def written(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], *, last: bool
    ) -> TextLogprobs:
        """Return the entries of tokens that were written; after the last, no more come."""
        texts = []
        for place, token in enumerate(tokens):
            ends = last and place == len(tokens) - 1 and token in self._ends
            texts.append("" if ends else self._text.push([token]))
        if last and texts:
            texts[-1] += self._text.finish()
        return self._entries(texts, logprobs)

    def _entries(self, texts: list[str], logprobs: Sequence[TokenLogprob | None]) -> TextLogprobs:
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return TextLogprobs(
            tokens=texts,
            token_logprobs=[None if one is None else one.logprob for one in logprobs],
            top_logprobs=[
                None if one is None else self._top(one, text)
                for one, text in zip(logprobs, texts, strict=True)
            ],
            text_offset=offsets,
        )

    def _top(self, one: TokenLogprob, text: str) -> dict[str, float]:
        """Return log-probabilities by text, the token's own too; of equal texts, the best."""
        key = text or self._vocabulary.text(one.token)
        found: dict[str, float] = {}
        for token, logprob in one.top:
            found.setdefault(key if token == one.token else self._vocabulary.text(token), logprob)
        found.setdefault(key, one.logprob)
        return found


def joined(parts: Sequence[TextLogprobs]) -> TextLogprobs:
    """Return entries that follow each other as one object."""
    return TextLogprobs(
        tokens=[x for part in parts for x in part.tokens],
        token_logprobs=[x for part in parts for x in part.token_logprobs],
        top_logprobs=[x for part in parts for x in part.top_logprobs],
        text_offset=[x for part in parts for x in part.text_offset],
    )

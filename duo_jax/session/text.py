"""Text from a session: rows are continued, and decoded to characters as the tokens arrive."""

from collections.abc import Iterator, Sequence

from duo_jax.schema.check import argument
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.session.detokenize import Detokenizer
from duo_jax.session.session import SEGMENT, Session
from duo_jax.session.tokenization import Tokenization


def write_text(
    session: Session,
    tokenization: Tokenization,
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    segment: int | None = SEGMENT,
    continues: bool = True,
) -> Iterator[list[str]]:
    """Continue all rows of a session; yield the new text of every row, some at a time.

    Args:
      session: has read something.
      tokenization: tokenizer of its model; tokens that end a text are not part of the text.
      max_new_tokens: maximum number of new tokens per row.
      stop: string or strings at which a row ends; they are not part of the text.
      seed: random seed.
      sampling: how tokens are drawn; default: greedy.
      segment: as in `Session.decode`; with stop strings it is one token, so that nothing after a
        stop string gets into the cache.
      continues: the text goes on where the row ends, with a space between words; otherwise, as in
        a chat, it is a text of its own.

    Raises:
      InputError: as `Session.decode`.
    """
    if isinstance(stop, str):
        stop = (stop,)
    stop = argument("stop", stop, tuple[str, ...])
    rows = [
        Detokenizer(tokenization.tokenizer, context=tokens if continues else (), stop=stop)
        for tokens in session.tokens
    ]
    ended: set[int] = set()
    for new in session.decode(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=tokenization.stop_tokens,
        seed=seed,
        segment=1 if stop else segment,
        ended=ended,
    ):
        pieces = []
        for index, (row, tokens) in enumerate(zip(rows, new, strict=True)):
            stops = bool(tokens) and tokens[-1] in tokenization.stop_tokens
            pieces.append(row.push(tokens[:-1] if stops else tokens))
            if row.stopped:
                ended.add(index)
        yield pieces
    yield [row.finish() for row in rows]

"""Texts of one length for perplexity: stretches of documents that do not overlap."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from duo_jax.data.passkeys import bos_tokens
from duo_jax.data.text_pieces import PieceEncoder
from duo_jax.errors import InputError


def stretches(
    tokenizer, documents: Sequence[str], *, length: int, samples: int
) -> list[Int[np.ndarray, " length"]]:
    """Return texts, spread evenly over what there is.

    Each is a stretch of one document where enough of them are long enough; otherwise of all
    documents in a row.

    Args:
      tokenizer: of transformers.
      documents: the text.
      length: tokens of each text, with the token that the model expects at the beginning.
      samples: number of texts.

    Raises:
      InputError: there is less text.
    """
    bos, pieces = bos_tokens(tokenizer), PieceEncoder(tokenizer)
    encoded = [np.array(pieces.encode(text + "\n\n"), np.int32) for text in documents]
    size = length - len(bos)
    found = [stretch for tokens in encoded for stretch in _cut(tokens, size)]
    if len(found) < samples:
        found = _cut(np.concatenate(encoded), size)
    if len(found) < samples:
        raise InputError(
            f"the text has {sum(map(len, encoded)):,} tokens, {samples:,} texts of {length:,} are "
            "needed; give more with --text, or lower --length or --samples"
        )
    chosen = np.linspace(0, len(found) - 1, samples).astype(int)
    return [np.array([*bos, *found[i]], np.int32) for i in chosen]


def _cut(tokens: Int[np.ndarray, " _"], size: int) -> list[Int[np.ndarray, " size"]]:
    ends = range(size, tokens.size + 1, size)
    return [tokens[end - size : end] for end in ends]

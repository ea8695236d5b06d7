"""Relative error of the logits for each format of quantised weights, as a table.

The error is that of benchmarks.quantised, over all tokens of a text. Beside it, how often the most
likely next token stays the same.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import duo_jax
from benchmarks import command
from benchmarks.quantised import LogitsError, compare_logits
from duo_jax import files, serve
from duo_jax.api import DuoModel
from duo_jax.cache import init_cache
from duo_jax.checkpoints import pretrained
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.reports import markdown

_TOKENS = 512  # of the text, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsErrorFlags:
    """Which model and formats."""

    model: str = pretrained.DEMO
    """A model as python -m duo_jax.generate takes it; its own prompt.txt is read."""
    formats: tuple[WeightFormat, ...] = ("int8", "w8a8", "int4")
    """Formats of weights."""


def logits(model: DuoModel, tokens: Sequence[int]) -> Float[np.ndarray, "tokens vocab"]:
    """Return the logits after every token, read in one chunk."""
    cache = init_cache(model.config, batch_size=1, max_len=len(tokens), dtype=model.runtime.dtype)

    @jax.jit
    def read(params, cache, tokens, num_tokens):
        x, _ = serve.hidden_states(model.config, params, cache, tokens, num_tokens)
        return serve.logits(model.config, params, x)[0]

    row, length = jnp.asarray([tokens], jnp.int32), jnp.asarray([len(tokens)], jnp.int32)
    return np.asarray(read(model.params, cache, row, length), np.float32)


def by_weights(name: str, formats: Sequence[WeightFormat]) -> dict[str, LogitsError]:
    """Return the error of each format on a model that brings a prompt.txt and a pattern."""
    load = functools.partial(duo_jax.load, name)
    own = load()
    text = files.read_text(pretrained.resolve(name) / "prompt.txt")
    tokens = own.tokenization.encode(text)[:_TOKENS]
    want = logits(own, tokens)
    return {
        weights: compare_logits(logits(load(weights=weights), tokens), want) for weights in formats
    }


def to_markdown(errors: dict[str, LogitsError]) -> str:
    """Return the table."""
    return markdown.table(
        ("weights", "relative error of logits", "same most likely token"),
        [
            (weights, f"{error.relative:.2%}", f"{error.same_choice:.1%}")
            for weights, error in errors.items()
        ],
    )


def main(flags: LogitsErrorFlags) -> None:
    """Print the table."""
    print(to_markdown(by_weights(flags.model, flags.formats)))


if __name__ == "__main__":
    command.run(main, LogitsErrorFlags)

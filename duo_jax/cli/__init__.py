"""Command lines: flags, choice of a model, defaults that a model brings, errors, work folders."""

from duo_jax.cli.command import fail, run

__all__ = ["fail", "run"]

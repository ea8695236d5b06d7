"""How every command parses its flags, chooses a model and reports bad input."""

from duo_jax.cli.command import fail, run

__all__ = ["fail", "run"]

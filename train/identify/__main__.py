"""Command line of identification."""

import argparse
import sys

from duo_jax import cli, pretrained
from duo_jax.errors import InputError
from train.identify.config import IdentifyConfig, default_config
from train.identify.run import identify

_DESCRIPTION = """\
Find the retrieval heads of a model: learn one gate per KV head on synthetic passkeys, write the
pattern, draw it, and test how well it keeps what the model can retrieve.

Without flags this runs on the demo model that ships with duo_jax. Defaults shown are those of the
model named by --model: its own preset (identify.json) where it has one, else the paper's.
"""


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    args = sys.argv[1:] if args is None else args
    cli.run(
        identify,
        IdentifyConfig,
        prog="python -m train.identify",
        description=_DESCRIPTION,
        default=_defaults(args),
        args=args,
    )


def _defaults(args: list[str]) -> IdentifyConfig | None:
    """Look ahead for --model, whose preset decides the defaults of the other flags."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--model", default=IdentifyConfig.model)
    try:
        model = peek.parse_known_args(args)[0].model
        return default_config(model, pretrained.resolve(model))
    except argparse.ArgumentError:
        return None  # the real parser will complain
    except InputError as error:
        cli.fail(error)


if __name__ == "__main__":
    main()

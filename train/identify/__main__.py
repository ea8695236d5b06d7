"""Command line of identification."""

if __name__ == "__main__":  # a signal ends what follows in one line: jax takes seconds to import
    from duo_jax.process import startup

    startup.begin()


from duo_jax import cli
from duo_jax.cli import presets
from train.identify.flags import IdentifyConfig, default_config
from train.identify.run import identify

_DESCRIPTION = """\
Find the retrieval heads of a model: learn one gate per KV head on synthetic passkeys, write the
pattern, draw it, and test how many passkeys the model still retrieves with it.

Without flags this runs on the demo model that ships with duo_jax. Defaults shown are those of the
model named by --model: its own preset (identify.json) is among them where it has one.
"""


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        identify,
        IdentifyConfig,
        prog="python -m train.identify",
        description=_DESCRIPTION,
        default=lambda: presets.defaults(args, IdentifyConfig.model, default_config),
        args=args,
    )


if __name__ == "__main__":
    main()

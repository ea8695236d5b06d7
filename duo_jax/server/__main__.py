"""python -m duo_jax.server: answer many clients, with OpenAI's HTTP interface."""

if __name__ == "__main__":  # a signal ends what follows in one line: jax takes seconds to import
    from duo_jax.process import startup

    startup.begin()

import importlib.util
import pathlib

from duo_jax import cli
from duo_jax.checkpoints import pretrained
from duo_jax.cli import presets
from duo_jax.errors import InputError
from duo_jax.server.flags import ServerFlags
from duo_jax.session.generation_config import suggested_sampling

_DESCRIPTION = """\
Serve a split model to many clients, with the HTTP interface of OpenAI: /v1/chat/completions,
/v1/completions, /v1/models; and a page to chat with it at /.

Needs the extra "server": pip install "duo_jax[server]". On Ctrl-C or SIGTERM it refuses new
requests, gives running ones time to finish, and exits with code 0; a second signal exits at once.

The flags from --temperature on hold where a request says nothing. By default they are those of the
model's generation_config.json, else OpenAI's temperature of 1.
"""
_EXTRA = ("fastapi", "uvicorn", "llguidance", "prometheus_client")


def serve(flags: ServerFlags) -> None:
    """Serve until a signal comes.

    Raises:
      InputError: a flag cannot be used, or the extra is not installed.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'{missing[0]} is not installed: pip install "duo_jax[server]"')
    from duo_jax.server import serving  # imports what only the extra brings

    serving.serve(flags)


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        serve,
        ServerFlags,
        prog="python -m duo_jax.server",
        description=_DESCRIPTION,
        default=lambda: presets.defaults(args, pretrained.DEMO, _defaults),
        args=args,
    )


def _defaults(_: str, folder: pathlib.Path) -> ServerFlags:
    return ServerFlags(sampling=suggested_sampling(folder, temperature=1.0))


if __name__ == "__main__":
    main()

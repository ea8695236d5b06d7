"""`python -m convert.scores`: scores of heads that others publish, as a pattern."""

if __name__ == "__main__":  # a signal ends what follows in one line
    from duo_jax.process import startup

    startup.begin()


import dataclasses
import pathlib
from typing import Annotated

import tyro

from convert.kvzip_scores import read_scores
from duo_jax import cli
from duo_jax.errors import InputError
from duo_jax.heads.headwise_config import read_headwise_config
from duo_jax.heads.pattern import Pattern, save_pattern
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count, Size

_DESCRIPTION = """\
Make a pattern, which every command takes with --pattern, from head scores that others publish:
KVzip's head scores (.pt; needs PyTorch), or rtp-llm's headwise_config (a model's config.json).
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Flags of the command."""

    src: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="SRC")]
    """The scores: a .pt file of KVzip, or a config.json with headwise_config."""

    dst: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="DST")]
    """The pattern folder to make."""

    sink: Size | None = None
    """First tokens that a streaming head keeps. Default: what SRC says; KVzip's files say nothing:
    128."""
    recent: Count | None = None
    """Latest tokens that a streaming head keeps. Default: what SRC says; KVzip's files say nothing:
    256."""

    def __post_init__(self) -> None:
        check_fields(self)


def import_scores(flags: ScoresConfig) -> None:
    """Write the pattern.

    Raises:
      InputError: the scores cannot be read, or the folder cannot be written.
    """
    suffix = flags.src.suffix.lower()
    if suffix == ".pt":
        extra = {"made_by": "KVzip"}
        gates = read_scores(flags.src)
        pattern = Pattern(gates=gates, sink_size=128, recent_size=256, extra=extra)
    elif suffix == ".json":
        pattern = read_headwise_config(flags.src)
    else:
        raise InputError(f"{flags.src} is neither a .pt nor a .json file")
    given = {"sink_size": flags.sink, "recent_size": flags.recent}
    sizes = {name: size for name, size in given.items() if size is not None}
    pattern = dataclasses.replace(pattern, **sizes)
    save_pattern(pattern, flags.dst)
    layers, heads = pattern.gates.shape
    print(f"{layers} layers x {heads} KV heads, mean {pattern.gates.mean():.3f}: {flags.dst}")


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        import_scores,
        ScoresConfig,
        prog="python -m convert.scores",
        description=_DESCRIPTION,
        args=args,
        keep_programs=False,
    )


if __name__ == "__main__":
    main()

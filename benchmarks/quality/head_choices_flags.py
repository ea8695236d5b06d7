"""The flags of benchmarks.head_choices, and their defaults for a model."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from benchmarks.quality import named
from benchmarks.quality.head_choices_report import FULL, RANDOM, STREAMING
from duo_jax.checkpoints import pretrained
from duo_jax.data.passkey_templates import PasskeyTemplates
from duo_jax.data.passkeys import PasskeyConfig
from duo_jax.errors import InputError
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count, Few, FewOrNone, Fraction, Seed, Size
from duo_jax.session.runtime import check_implementation
from kernels import Implementation
from train.identify.flags import default_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Templates(PasskeyTemplates):
    """The words around passkeys; how many there are is a flag of its own."""

    num_passkeys: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadChoicesFlags:
    """Flags of the benchmark."""

    model: str = pretrained.DEMO
    """A Hugging Face folder, a GGUF file, a hub name such as org/name, a converted checkpoint, or
    "demo", the model that ships with duo_jax."""
    patterns: tuple[str, ...] = ()
    """Patterns to compare, NAME=FOLDER each; several of one name are seeds of one method, shown by
    their mean and range. Others are compared with the one named "profile". Default: the model's
    own, named "learned"."""
    sparsities: tuple[Fraction, ...] = (0.5, 0.75)
    """Fractions of streaming heads."""
    random_seeds: FewOrNone = 5
    """Random choices of heads for each sparsity."""
    lengths: tuple[Count, ...] = (1024, 2048, 4096, 8192)
    """Lengths of the texts, in tokens, questions and answers included."""
    num_passkeys: tuple[Few, ...] = (1, 4)
    """Pass keys in a text; each number is a table of its own."""
    tokens: Count = 8192
    """Tokens of all texts of a length, so that lengths cost about the same; at least one text."""
    sink: Size | None = None
    """Number of first tokens that a streaming head keeps. Default: the first pattern's."""
    recent: Count | None = None
    """Number of latest tokens that a streaming head keeps. Default: the first pattern's."""
    seed: Seed = 0
    """Random seed of texts and passkeys."""
    text: tuple[str, ...] = ()
    """Text to hide passkeys in, as in python -m train.identify: name what the patterns learned
    from, so that the part is read that they never saw."""
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    """Data type of weights and activations."""
    implementation: Implementation = "auto"
    """Implementation of attention, as in python -m train.identify."""
    workdir: str | None = None
    """Folder of the rows; the same command goes on in it. Default: runs/head-choices-MODEL."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/head_choices.json")
    """Where to write the result; .md and .png stand beside it."""
    data: Annotated[Templates, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: Templates(words="digits")
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_implementation(self.implementation)
        for name in ("sparsities", "lengths", "num_passkeys"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise InputError(f"{name} is empty, or names a value twice: {values}")
        names = {name for name, _ in named.split(self.patterns)}
        for taken in names & {FULL, RANDOM, STREAMING}:
            raise InputError(f"a pattern cannot be named {taken!r}: the tables have such a line")

    def folder(self) -> pathlib.Path:
        """Return the work folder."""
        name = pathlib.PurePath(self.model.rstrip("/")).name
        return pathlib.Path(self.workdir or f"runs/head-choices-{name}")


def default(model: str, folder: pathlib.Path) -> HeadChoicesFlags:
    """Return the defaults for a model: passkeys of its identify.json if it has one, else digits.

    Args:
      model: the value of --model.
      folder: its folder.
    """
    preset = default_config(model, folder).data
    if preset == PasskeyConfig():
        return HeadChoicesFlags(model=model)
    names = {field.name for field in dataclasses.fields(Templates)} - {"num_passkeys"}
    data = Templates(**{name: getattr(preset, name) for name in names})
    return HeadChoicesFlags(model=model, data=data)

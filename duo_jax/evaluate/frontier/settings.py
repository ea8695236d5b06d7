"""Flags of the command, and the settings of the caches that they ask for."""

import dataclasses
import itertools
import pathlib
from typing import Annotated

import tyro

from duo_jax.cache import KVFormat
from duo_jax.cli.model_flags import ModelFlags
from duo_jax.data.passkey_templates import PasskeyTemplates
from duo_jax.errors import InputError
from duo_jax.evaluate.compare.tasks import TaskName
from duo_jax.schema.kinds import Count, Few, Fraction, Many, Seed, Share
from duo_jax.session.runtime import KeepBy

TASK = "frontier"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A choice on each of the three axes; the defaults are full caches."""

    sparsity: float = 0.0  # fraction of streaming heads
    kv: KVFormat = "model"
    keep: float = 1.0  # fraction of tokens that retrieval heads keep

    @property
    def name(self) -> str:
        """The words for it in tables."""
        words = [
            f"{100 * self.sparsity:g}% streaming" if self.sparsity else "",
            self.kv if self.kv != "model" else "",
            f"{100 * self.keep:g}% of tokens" if self.keep < 1 else "",
        ]
        return ", ".join(filter(None, words)) or "full caches"

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes on which it saves bytes."""
        saved = {
            "split": self.sparsity > 0,
            "format": self.kv != "model",
            "eviction": self.keep < 1,
        }
        return tuple(axis for axis, saves in saved.items() if saves)

    def formats(self) -> dict[str, object]:
        """Return the arguments of `duo_jax.load` for what is not the default, but for the split."""
        usual, chosen = Setting(), {"kv": self.kv, "keep": self.keep}
        return {name: value for name, value in chosen.items() if value != getattr(usual, name)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierConfig(ModelFlags):
    """Flags of the command."""

    budgets: tuple[Share, ...] = (0.5, 0.25, 0.125)
    """Budgets to name the best setting for: bytes, as fractions of those of full caches."""
    sparsities: tuple[Fraction, ...] = (0.5, 0.75, 0.875)
    """Fractions of streaming heads."""
    kv_formats: tuple[KVFormat, ...] = ("int8", "int4")
    """Formats of caches, beside the model's own: bf16, int8, int4, int2."""
    keeps: tuple[Share, ...] = (0.5, 0.25, 0.125)
    """Fractions of tokens that retrieval heads keep."""
    keep_by: KeepBy = "kvzip"
    """Which tokens --keeps keeps. snapkv: what the end of the text looks at. kvzip: what the model
    needs to repeat the text."""
    tasks: tuple[TaskName, ...] = ("passkeys",)
    """needle: one passkey; the question is read before tokens are evicted. passkeys: several;
    their questions come after tokens are evicted."""
    text: tuple[str, ...] = ()
    """Text to hide passkeys in: files (.jsonl, .ndjson and .json hold texts as JSON; also packed,
    as .zst), folders, or the name of a Hugging Face data set. Default: the language reference that
    comes with Python (about 465 KB)."""
    samples: Many = 16
    """Texts per task."""
    length: Count = 1024
    """Tokens of a text, with its questions and answers."""
    batch: Few = 8
    """Texts read at a time; more is faster and takes more memory."""
    seed: Seed = 0
    """Random seed of texts and passkeys; two runs with one seed agree exactly."""
    workdir: str | None = None
    """Folder of rows and results; the same command resumes from it. Default:
    runs/frontier-MODEL."""
    data: Annotated[PasskeyTemplates, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=PasskeyTemplates
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budgets", "tasks"):
            if not getattr(self, name):
                raise InputError(f"--{name} must name one or more")
        for name in ("budgets", "sparsities", "kv_formats", "keeps", "tasks"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"--{name.replace('_', '-')} names one twice")
        if self.sparsity is not None or self.threshold is not None:
            raise InputError("--sparsities say how many heads stream; leave out the other flag")
        if self.kv != "model" or self.keep < 1:
            raise InputError("--kv-formats and --keeps are what is measured: leave out the other")

    def folder(self) -> pathlib.Path:
        """Return the work folder."""
        name = pathlib.PurePath(self.model.rstrip("/")).name
        return pathlib.Path(self.workdir or f"runs/{TASK}-{name}")

    def settings(self) -> list[Setting]:
        """Return all combinations, full caches first; "int2" evicts no tokens."""
        found = [
            Setting(sparsity=sparsity, kv=kv, keep=keep)
            for sparsity, kv, keep in itertools.product(
                (0.0, *self.sparsities), ("model", *self.kv_formats), (1.0, *self.keeps)
            )
            if kv != "int2" or keep == 1
        ]
        return list(dict.fromkeys(found))

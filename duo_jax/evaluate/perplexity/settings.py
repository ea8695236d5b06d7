"""Flags of the command, and the settings of the model that they ask for."""

import dataclasses
import pathlib
from typing import Any

from duo_jax.api import DuoModel
from duo_jax.cache import KVFormat
from duo_jax.cli.model_flags import ModelFlags
from duo_jax.errors import InputError
from duo_jax.heads.choose import NO_PATTERN
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.schema.kinds import Count, Few, Fraction

TASK = "perplexity"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How the model is served."""

    weights: WeightFormat
    kv: KVFormat
    sparsity: float | None = None  # None: full caches

    @property
    def name(self) -> str:
        """The words for it in tables and pictures."""
        caches = "full caches" if self.sparsity is None else f"{100 * self.sparsity:g}% streaming"
        formats = (("weights", self.weights), ("KV", self.kv))
        return ", ".join([caches, *(f"{form} {what}" for what, form in formats if form != "model")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityConfig(ModelFlags):
    """Flags of the command."""

    full: bool = True
    """Measure the model as published, every head with a full cache; others are compared with it."""
    sparsities: tuple[Fraction, ...] = (0.25, 0.5, 0.75)
    """Fractions of streaming heads to measure; with nothing after the flag, none."""
    weight_formats: tuple[WeightFormat, ...] = ()
    """Formats of weights to measure with full caches: int8, w8a8, int4."""
    kv_formats: tuple[KVFormat, ...] = ()
    """Formats of caches to measure with full caches: bf16, int8, int4, int2."""
    text: tuple[str, ...] = ()
    """Text to be predicted: files (.jsonl, .ndjson and .json hold texts as JSON; also packed, as
    .zst), folders, or the name of a Hugging Face data set. All of it is used: name what the pattern
    was not found on. Default: the held-out tenth of the language reference that comes with
    Python."""
    length: Count | None = None
    """Tokens of a text. Default: the model's range, at most 8,192."""
    samples: Few = 1
    """Texts, which do not overlap."""
    workdir: str | None = None
    """Folder of rows and results; the same command resumes from it. Default:
    runs/perplexity-MODEL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None or self.threshold is not None:
            raise InputError(
                "--sparsities say how many heads stream; leave out --sparsity and --threshold"
            )
        for name in ("sparsities", "weight_formats", "kv_formats"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"--{name.replace('_', '-')} names one twice")
        if self.pattern == NO_PATTERN and self.sparsities:
            raise InputError(
                "without a pattern no head streams: add --sparsities with nothing after it"
            )
        if self.keep < 1:
            raise InputError(
                "perplexity reads a text and writes nothing: no token is evicted, leave out --keep"
            )
        if not self.settings():
            raise InputError("there is nothing to measure")

    def folder(self) -> pathlib.Path:
        """Return the work folder."""
        name = pathlib.PurePath(self.model.rstrip("/")).name
        return pathlib.Path(self.workdir or f"runs/{TASK}-{name}")

    def settings(self) -> list[Setting]:
        """Return what is to be measured, full caches first."""
        own = Setting(weights=self.weights, kv=self.kv)
        found = [
            *([own] if self.full else []),
            *(dataclasses.replace(own, sparsity=sparsity) for sparsity in self.sparsities),
            *(dataclasses.replace(own, weights=weights) for weights in self.weight_formats),
            *(dataclasses.replace(own, kv=kv) for kv in self.kv_formats),
        ]
        return list(dict.fromkeys(found))

    def load_setting(self, setting: Setting) -> DuoModel:
        """Load the model as a setting has it."""
        changes: dict[str, Any] = {"weights": setting.weights, "kv": setting.kv}
        if setting.sparsity is None:
            return self.load(**changes, pattern=NO_PATTERN, sink=None, recent=None)
        return self.load(**changes, sparsity=setting.sparsity)

"""The flags of `python -m train.identify`, and the presets that a model folder may hold."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import tyro

from duo_jax.cli import presets
from duo_jax.data.passkeys import PasskeyConfig
from duo_jax.errors import InputError
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import (
    Count,
    Few,
    FewOrNone,
    Fraction,
    Many,
    ManyOrNone,
    NotNegative,
    Positive,
    Seed,
    Size,
)
from duo_jax.session.runtime import check_implementation
from kernels import Implementation
from train.distillation import Mixing
from train.loss import OfAnswers, Votes

PRESET_FILE = "identify.json"

Method = Literal["optimise", "budget", "masks", "attribute", "profile", "reconstruct", "lm"]
LearnFrom = Literal["text", "passkeys", "both"]

_PAPERS = {"num_steps": 2000, "learning_rate": 0.02, "mixing": "teacher"}
_DEFAULTS: dict[Method, dict[str, Any]] = {
    "budget": {"num_steps": 100, "learning_rate": 0.7, "mixing": "self", "target_sparsity": 0.75},
    "masks": {
        "num_steps": 1000,
        "mixing": "self",
        "target_sparsity": 0.75,
        "learn_from": "both",
    },
    "attribute": {
        "num_steps": 40,
        "mixing": "self",
        "target_sparsity": 0.75,
        "learn_from": "passkeys",
        "objective": "cross_entropy",
        "votes": "loss",
    },
}

_MOST_TARGETS = 100
_MOST_CHOICES = 10_000  # of heads; all are listed before they are tested
_STEPWISE: tuple[Method, ...] = ("optimise", "budget", "masks", "attribute", "lm")
_READ_BY: dict[str, tuple[Method, ...]] = {
    "num_steps": _STEPWISE,
    "learning_rate": ("optimise", "budget", "masks", "lm"),
    "reg_weight": ("optimise", "lm"),
    "target_sparsity": _STEPWISE,
    "target_sparsities": _STEPWISE,
    "mixing": _STEPWISE,
    "tensorboard": _STEPWISE,
    "learn_from": ("masks", "attribute"),
    "objective": ("attribute",),
    "votes": ("attribute",),
    "init": ("budget", "masks"),
    "profile_samples": ("profile", "reconstruct"),
    "min_passkeys": ("optimise", "budget", "masks", "attribute", "profile"),
    "chats": (*_STEPWISE, "profile"),
}
_FLAGS = {"learn_from": "data"}  # whose names are not those of their fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentifyConfig:
    """Flags of the command; a model may bring a preset. Samples and sizes are the paper's.

    The default method is the one that chose the best heads for a pretrained model (docs/results.md,
    choices of heads).
    """

    model: str = "demo"
    """A Hugging Face folder, a GGUF file, a hub name such as org/name, a converted checkpoint, or
    "demo", the model that ships with duo_jax."""
    text: tuple[str, ...] = ()
    """Text to hide passkeys in: files (.jsonl, .ndjson and .json hold texts as JSON; also packed,
    as .zst), folders, or the name of a Hugging Face data set. Default: the language reference that
    comes with Python (about 465 KB)."""
    workdir: str | None = None
    """Folder of all outputs; the same command resumes from it. Default: runs/identify-MODEL."""

    method: Method = "budget"
    """How to find retrieval heads.
    budget: learn gates from how far the answers are from those of full attention; their mean is
    set at every step, and falls to 1 - --target-sparsity.
    optimise: learn gates by distillation on passkeys, the paper's method.
    masks: learn masks that are 0 or 1 at --target-sparsity on next-token loss (PruLong).
    attribute: integrate the gradient of the answers' likelihood along the gates, from all 1 to
    their mean at --target-sparsity; no training.
    profile: sum each head's attention far back while the model answers passkeys; no training.
    reconstruct: the largest attention that each head pays while the model repeats plain text
    (KVzip); no training.
    lm: learn gates on the next-token loss of the text, without passkeys; an ablation."""
    profile_samples: Many = 16
    """Samples to profile, or texts to reconstruct, for --method profile and reconstruct, which
    refuse the flags of optimisation."""

    learn_from: Annotated[LearnFrom | None, tyro.conf.arg(name="data")] = None
    """What --method masks and attribute predict. text: plain text. passkeys: the answers; default
    of attribute. both: by turns; default of masks."""
    objective: OfAnswers | None = None
    """What --method attribute takes the gradient of.
    cross_entropy: the NLL of what is predicted. The default.
    divergence: the KL divergence of the predictions from those of full attention; of plain text, of
    as many last tokens as questions and answers have."""
    votes: Votes | None = None
    """How much each text counts for --method attribute.
    loss: by what its answers lose, mostly at the end of the path (integrated gradients). The
    default.
    equal: all alike, its gradients divided by the sum of their magnitudes."""
    init: str | None = None
    """A pattern folder to start from, for --method budget and masks: its order of heads counts
    as ten steps (budget) or as a small head start (masks)."""

    num_steps: Count | None = None
    """Optimisation steps, one sample each. Without a preset: 100; with --method optimise and lm,
    2,000; with masks, 1,000. With --method attribute, points of the path; without a preset, 40."""
    learning_rate: Positive | None = None
    """With --method budget it is constant, in logits of a gate per gradient of mean size; without a
    preset 0.7. With optimise and lm it rises over the first fifth of the steps and falls over the
    last, peak 0.02. With masks it rises over a tenth of the steps, then falls along a cosine: peak
    0.1, or 40 / steps if that is more."""
    reg_weight: NotNegative = 0.05
    """Weight of the mean gate in the loss of --method optimise and lm. Larger: fewer retrieval
    heads."""
    target_sparsity: Fraction | None = None
    """Fraction of streaming heads that --method budget and masks train for, and where the path of
    the gates ends with --method attribute; default: 0.75. With optimise and lm it steers the mean
    gate, in place of a penalty of fixed weight: for models whose gates nearly all stay at 1, as
    they do with grouped queries."""
    target_sparsities: tuple[Fraction, ...] = ()
    """Several targets: one run for each, as if it were alone, in target-0.5 and so on of the work
    folder. They are not nested: a pattern is made for the sparsity that it is served at."""
    mixing: Mixing | None = None
    """Source of the gated full-attention term.
    self: the student's own queries, keys and values, as in the paper's formula. The default.
    teacher: the teacher's output, as in the reference code; cheapest. The default of --method
    optimise and lm."""
    sink: Size = 128
    """Number of first tokens (attention sinks) that a streaming head keeps."""
    recent: Count = 256
    """Number of latest tokens that a streaming head keeps."""
    min_passkeys: Count | None = None
    """Fewest passkeys of a sample, which draws its number from here to --num-passkeys; the report's
    samples have --num-passkeys. Default: as many in each."""
    chats: bool = False
    """Put every second sample into the model's chat template, as a user's message and the
    assistant's answer, for models that are used so; the report's samples stay plain."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of weights and activations; gates and loss are always float32."""
    implementation: Implementation = "auto"
    """Implementation of attention. auto: triton on an NVIDIA GPU from A100 on, else xla. triton:
    our kernels. interpret: our kernels in Pallas' interpreter, for tests without a GPU; very
    slow. mosaic: our kernels for H100 and H200, which have no gradients; interpret_mosaic:
    these on a CPU."""
    devices: Count | None = None
    """Number of devices that share weights and heads. Default: all GPUs if one cannot hold the
    weights and what a step keeps of the longest sample, else one. A run may be resumed on another
    number."""
    seed: Seed = 0
    """Random seed of all samples; the same seed gives the same gates."""
    length_buckets: Few = 8
    """Number of lengths that samples are padded to; each is compiled once."""

    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the tensorboard extra)."""

    eval_samples: ManyOrNone = 8
    """Held-out samples of the longest length for the report; 0 skips the retrieval tests."""
    eval_sparsities: tuple[Fraction, ...] = (0.25, 0.5, 0.75)
    """Fractions of streaming heads at which the learned pattern is tested."""
    eval_random_seeds: FewOrNone = 5
    """Random patterns with as many retrieval heads, per sparsity, for comparison."""

    data: Annotated[PasskeyConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=PasskeyConfig
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_implementation(self.implementation)
        choices = len(self.eval_sparsities) * (1 + self.eval_random_seeds)
        if choices > _MOST_CHOICES:
            raise InputError(
                f"{len(self.eval_sparsities):,} sparsities with {self.eval_random_seeds:,} random "
                f"choices of heads are more than {_MOST_CHOICES:,} rows of a report"
            )
        if self.target_sparsities and self.target_sparsity is not None:
            raise InputError("--target-sparsity is one target, --target-sparsities several")
        if len(set(self.target_sparsities)) < len(self.target_sparsities):
            raise InputError("--target-sparsities must be different")
        if len(self.target_sparsities) > _MOST_TARGETS:
            raise InputError(f"--target-sparsities are more than {_MOST_TARGETS}")
        if "{name}" not in self.data.question:
            raise InputError("the question must hold {name}, or nothing can be looked up")

    def reads(self, name: str) -> bool:
        """Whether the method reads a field that not all methods do."""
        return self.method in _READ_BY[name]

    def check_method(self, defaults: "IdentifyConfig") -> None:
        """Refuse fields that the method does not read, unless they have their value in `defaults`.

        Raises:
          InputError: names one of them.
        """
        for name in _READ_BY:
            usual = (getattr(defaults, name), getattr(IdentifyConfig, name))
            if not self.reads(name) and getattr(self, name) not in usual:
                flag = "--" + _FLAGS.get(name, name).replace("_", "-")
                raise InputError(f"--method {self.method} does not read {flag}; leave it out")

    def resolved(self) -> "IdentifyConfig":
        """Return the flags with the method's defaults for those that were not given."""
        values = _DEFAULTS.get(self.method, _PAPERS)
        if self.method == "masks":  # in fewer steps they have as far to go
            rate = max(0.1, 40 / (self.num_steps or values["num_steps"]))
            values = values | {"learning_rate": rate}
        unset = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **unset)

    def runs(self) -> "list[IdentifyConfig]":
        """Return the flags of each target's own run, in a folder within this one's."""
        return [
            dataclasses.replace(
                self,
                target_sparsity=target,
                target_sparsities=(),
                workdir=str(self.folder() / f"target-{target}"),
            )
            for target in self.target_sparsities
        ]

    def folder(self) -> pathlib.Path:
        """Return the work folder."""
        name = pathlib.PurePath(self.model.rstrip("/")).name
        return pathlib.Path(self.workdir or f"runs/identify-{name}")


def default_config(model: str, folder: pathlib.Path) -> IdentifyConfig:
    """Return the defaults for a model: those of the fields, changed by its preset if it has one.

    Args:
      model: the value of --model.
      folder: its folder, which may hold an `identify.json` with any fields of IdentifyConfig.
    """
    return presets.load(IdentifyConfig(model=model), presets.file_of(folder, PRESET_FILE))

"""The settings of `python -m train.demo_model`: architecture, curriculum, optimiser."""

import dataclasses
import pathlib

import tyro

from duo_jax.data.passkey_templates import ORDINALS
from duo_jax.data.passkeys import PasskeyConfig
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig, RopeConfig

VOCAB_SIZE = 1024

# What documents and questions look like. The word before a passkey names it, in the text as in the
# question, so that looking a passkey up is plain induction: find what followed this word before.
TEMPLATES = PasskeyConfig(
    words="vocabulary",
    intro="Remember this.\n",
    needle="\nPasskey {name}{passkey}.\n",
    closing="\nRepeat this.\n",
    question="Passkey {name}",
    separator=".\n",
)

MODEL = ModelConfig(
    family="llama",
    vocab_size=VOCAB_SIZE,
    embed_size=128,
    mlp_size=256,
    num_layers=4,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=16,
    norm_eps=1e-5,
    max_positions=1024,
    rope=RopeConfig(theta=500_000.0),
    tie_embeddings=True,
)

_ANSWERS = {"num_passkeys": 8, "passkey_words": 8}
_TEMPLATES = {
    "words": TEMPLATES.words,
    "intro": TEMPLATES.intro,
    "needle": TEMPLATES.needle,
    "closing": TEMPLATES.closing,
    "question": TEMPLATES.question,
    "separator": TEMPLATES.separator,
}

# What `python -m train.identify` uses for this model: heads stream with few tokens, because the
# texts are short, and the penalty is large, because the steps are few.
PRESET = {
    "sink": 16,
    "recent": 96,
    "num_steps": 150,
    "reg_weight": 0.4,
    "dtype": "float32",
    "length_buckets": 2,
    "eval_samples": 32,
    "data": {
        **_ANSWERS,
        "min_length": 128,
        "max_length": 512,
        "num_lengths": 4,
        **_TEMPLATES,
    },
}

# What `python -m duo_jax.evaluate` uses for this model, by task.
EVALUATION = {
    "needle": {
        "batch": 10,
        "max_new_tokens": _ANSWERS["passkey_words"],
        "needle": {
            "intro": TEMPLATES.intro,
            "needle": TEMPLATES.needle.format(name=ORDINALS[0], passkey=" {answer}"),
            "answer": "{words}",
            "answer_words": _ANSWERS["passkey_words"],
            "words": TEMPLATES.words,
            "question": TEMPLATES.closing + TEMPLATES.question.format(name=ORDINALS[0]),
        },
    },
    "passkeys": {"batch": 8, "min_length": 320, "data": _ANSWERS | _TEMPLATES},
    "compare": {"data": _ANSWERS | _TEMPLATES},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the curriculum: documents of one length, until they are mastered.

    A document either hides passkeys in text or repeats a random block of tokens (`repeat` is the
    fraction of the latter: repeating is the shortest way to induction, which retrieval builds on).
    `rehearse` is the fraction of steps that go to a random earlier stage: without it, the model
    that has learned to look 1,000 tokens back no longer finds what is 100 tokens back.

    `rounded_kv` trains with keys and values as 4-bit caches hold them: 16 channels per head are too
    few to average rounding errors out, and without it such caches lose 7% of the passkeys.
    """

    length: int
    batch_size: int
    num_passkeys: tuple[int, ...]  # a document has one of these numbers
    passkey_words: tuple[int, ...]  # so do its passkeys
    repeat: float = 0.0
    rehearse: float = 0.0
    rounded_kv: bool = False
    learning_rate: float
    final_learning_rate: float | None = None  # reached at max_steps; None: constant
    threshold: float | None = None  # passkey tokens right before moving on; None: all the steps
    max_steps: int = 1500

    def __post_init__(self) -> None:
        if self.length > MODEL.max_positions:
            raise InputError(f"stage length {self.length} is beyond {MODEL.max_positions} tokens")
        for name in ("repeat", "rehearse"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} {getattr(self, name)} is not in [0, 1)")


# With 12 passkeys only, the model learns in which part of the text each ordinal stands.
_MIXED = Stage(
    length=1024,
    batch_size=4,
    num_passkeys=(6, 8, 10, 12),
    passkey_words=(4, 8),
    rehearse=0.3,
    learning_rate=1e-3,
    final_learning_rate=1e-4,
    max_steps=120,
)

CURRICULUM = (
    Stage(
        length=64,
        batch_size=32,
        num_passkeys=(2,),
        passkey_words=(3, 4, 5, 6),
        repeat=0.5,
        learning_rate=3e-3,
        threshold=0.90,
    ),
    Stage(
        length=64,
        batch_size=32,
        num_passkeys=(2,),
        passkey_words=(3, 4, 5, 6),
        repeat=0.1,
        learning_rate=2e-3,
        threshold=0.97,
    ),
    Stage(
        length=128,
        batch_size=16,
        num_passkeys=(4,),
        passkey_words=(4, 6, 8),
        repeat=0.1,
        learning_rate=2e-3,
        threshold=0.95,
    ),
    Stage(
        length=256,
        batch_size=8,
        num_passkeys=(8,),
        passkey_words=(4, 6, 8),
        repeat=0.05,
        rehearse=0.1,
        learning_rate=2e-3,
        threshold=0.97,
    ),
    Stage(
        length=512,
        batch_size=6,
        num_passkeys=(12,),
        passkey_words=(4, 7, 10),
        rehearse=0.2,
        learning_rate=2e-3,
        threshold=0.985,
    ),
    Stage(
        length=1024,
        batch_size=4,
        num_passkeys=(12,),
        passkey_words=(4, 7, 10),
        rehearse=0.3,
        learning_rate=2e-3,
        threshold=0.975,
    ),
    Stage(
        length=1024,
        batch_size=4,
        num_passkeys=(12,),
        passkey_words=(4, 7, 10),
        rehearse=0.5,
        learning_rate=2e-3,
        final_learning_rate=1e-4,
        max_steps=200,
    ),
    _MIXED,
    dataclasses.replace(_MIXED, rounded_kv=True, max_steps=160),
    dataclasses.replace(_MIXED, rounded_kv=True, max_steps=240, final_learning_rate=5e-5),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Flags of the command."""

    workdir: str = "runs/demo-model"
    """Checkpoints and metrics; started again, the command resumes from here."""
    output: pathlib.Path | None = None
    """The model folder to make; must not exist, or be empty. Default: model/ in the workdir."""
    seed: int = 0
    """Decides initial weights and every document."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    filler_weight: float = 0.2
    """Weight of ordinary text in the loss, next to 1 for the answers."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises at the very start."""
    check_every: int = 20
    """Steps between checks whether a stage's threshold is reached."""
    test_samples: int = 64
    """Held-out documents per length for the table at the end."""
    test_lengths: tuple[int, ...] = (256, 512, 1024)
    """Lengths of the table at the end, in tokens."""
    model: tyro.conf.Suppress[ModelConfig] = MODEL
    curriculum: tyro.conf.Suppress[tuple[Stage, ...]] = CURRICULUM

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "check_every", "warmup_steps", "test_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("seed", "filler_weight", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)} must not be negative")

    def folder(self) -> pathlib.Path:
        """Return the folder of the finished model."""
        return self.output or pathlib.Path(self.workdir) / "model"

"""The demo model's architecture, and the stages that it is trained in."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig, RopeConfig

MODEL = ModelConfig(
    family="llama",
    vocab_size=1024,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the curriculum: documents of one length, until the model finds their passkeys.

    A document either hides passkeys in text or repeats a random block of tokens (`repeat` is the
    fraction of the latter: repeating is the shortest way to induction, which retrieval builds on).
    `rehearse` is the fraction of steps that go to a random earlier stage: without it, the model
    that has learned to look 1,000 tokens back no longer finds what is 100 tokens back.

    `rounded_kv` trains with keys and values as 4-bit caches hold them: 16 channels per head are too
    few to average rounding errors out, and without it such caches lose 7% of the passkeys.
    """

    length: int
    batch_size: int
    num_passkeys: tuple[int, ...]  # a document has one of these numbers of passkeys
    passkey_words: tuple[int, ...]  # and a passkey one of these numbers of words
    repeat: float = 0.0
    rehearse: float = 0.0
    rounded_kv: bool = False
    learning_rate: float
    final_learning_rate: float | None = None  # reached at max_steps; None: constant
    threshold: float | None = None  # passkey tokens right that end the stage; None: max_steps does
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


def drawn_stage(curriculum: Sequence[Stage], number: int, *, step: int, seed: int) -> int:
    """Return the stage that a step's documents come from: the present one, or an earlier one."""
    rng = np.random.default_rng([seed, step])
    if rng.random() < curriculum[number].rehearse:
        return int(rng.integers(number))
    return number


def learning_rate(stage: Stage, *, step: int, stage_step: int, warmup_steps: int) -> float:
    """Return the rate at `stage_step` of a stage, which is `step` of the whole training."""
    rate = stage.learning_rate
    if stage.final_learning_rate is not None:
        rate += (stage.final_learning_rate - rate) * stage_step / stage.max_steps
    return rate * min(1.0, (step + 1) / warmup_steps)

"""The flags of `python -m train.demo_model`."""

import dataclasses
import pathlib

from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count, Many, NotNegative, Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Flags of the command."""

    workdir: str = "runs/demo-model"
    """Folder of checkpoints and metrics; the same command resumes from it."""
    output: pathlib.Path | None = None
    """Folder for the model: a new one, or an empty one. Default: model/ in the workdir."""
    seed: Seed = 0
    """Random seed of initial weights and documents."""
    checkpoint_every: Count = 25
    """Steps between checkpoints."""
    filler_weight: NotNegative = 0.2
    """Weight of ordinary text in the loss, where answers have weight 1."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""
    warmup_steps: Count = 50
    """Steps over which the learning rate rises at the start."""
    check_every: Count = 20
    """Steps between checks of a stage's threshold."""
    test_samples: Many = 64
    """Held-out documents per length, for the table of retrieval at the end."""
    test_lengths: tuple[Count, ...] = (256, 512, 1024)
    """Lengths of that table, in tokens."""

    def __post_init__(self) -> None:
        check_fields(self)

    def folder(self) -> pathlib.Path:
        """Return the folder of the finished model."""
        return self.output or pathlib.Path(self.workdir) / "model"

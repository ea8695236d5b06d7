"""The flags of `python -m train.demo_model`."""

import dataclasses
import pathlib

from duo_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Flags of the command."""

    workdir: str = "runs/demo-model"
    """Folder of checkpoints and metrics; the same command resumes from it."""
    output: pathlib.Path | None = None
    """Folder for the model; must not exist, or be empty. Default: model/ in the workdir."""
    seed: int = 0
    """Random seed of initial weights and documents."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    filler_weight: float = 0.2
    """Weight of ordinary text in the loss, where answers have weight 1."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises at the start."""
    check_every: int = 20
    """Steps between checks of a stage's threshold."""
    test_samples: int = 64
    """Held-out documents per length, for the table of retrieval at the end."""
    test_lengths: tuple[int, ...] = (256, 512, 1024)
    """Lengths of that table, in tokens."""

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

"""The settings that a plan compares, sorted by how much quality they cost."""

import dataclasses

from duo_jax.cache import KVFormat
from duo_jax.model.quantised_weights import WeightFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Caches and formats of one row of a plan."""

    duo: bool  # streaming heads keep sinks and recent tokens only
    weights: WeightFormat = "model"
    kv: KVFormat = "model"

    def __str__(self) -> str:
        caches = "duo" if self.duo else "full"
        return f"{caches} caches, weights {self.weights}, KV {self.kv}"


# 8 bits cost next to nothing, 4-bit caches and 4-bit weights about the same (docs/formats.md):
# caches come first, as they save more. A 2-bit cache costs most.
_FORMATS: tuple[tuple[WeightFormat, KVFormat], ...] = (
    ("model", "model"),
    ("model", "int8"),
    ("int8", "model"),
    ("int8", "int8"),
    ("model", "int4"),
    ("int8", "int4"),
    ("int4", "model"),
    ("int4", "int8"),
    ("int4", "int4"),
    ("model", "int2"),
    ("int8", "int2"),
    ("int4", "int2"),
)


def all_settings(*, duo: bool) -> tuple[Setting, ...]:
    """Return the usual settings, the one with the least loss of quality first.

    Formats come in the order of `_FORMATS`; with equal formats, full caches come first.

    Args:
      duo: the model has streaming heads; otherwise there are only full caches.
    """
    return tuple(
        Setting(duo=split, weights=weights, kv=kv)
        for weights, kv in _FORMATS
        for split in ((False, True) if duo else (False,))
    )


def chosen_settings(
    *, duo: bool, weights: WeightFormat | None, kv: KVFormat | None
) -> tuple[Setting, ...]:
    """Return the settings to plan: all, or the model as it is and the one that was asked for.

    Args:
      duo: as in `all_settings`.
      weights: format that was asked for; None: as they are, where `kv` is given.
      kv: format that was asked for; None: as it is, where `weights` is given.
    """
    if weights is None and kv is None:
        return all_settings(duo=duo)
    baseline = Setting(duo=False)
    asked = Setting(duo=duo, weights=weights or "model", kv=kv or "model")
    return (baseline,) if asked == baseline else (baseline, asked)

"""What can be chosen to make a context fit, in the order in which quality suffers."""

import dataclasses

from duo_jax.cache import KVFormat
from duo_jax.model.quantised_weights import WeightFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of a plan."""

    duo: bool  # streaming heads keep sinks and recent tokens only
    weights: WeightFormat = "model"
    kv: KVFormat = "model"

    def __str__(self) -> str:
        caches = "duo" if self.duo else "full"
        return f"{caches} caches, weights {self.weights}, KV {self.kv}"


# 8 bits lose next to nothing, 4 bits of the cache less than 4 bits of the weights, 2 bits most.
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
    """Return every sensible setting, the least loss of quality first.

    The formats of weights and cache come in the order of `_FORMATS`; of two settings with the same
    formats the one with full caches comes first.

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
    """Return the settings to plan: all, or the one that was asked for behind the model as it is.

    Args:
      duo: as of `all_settings`.
      weights: asked for; None where `kv` is given: as they are.
      kv: asked for; None where `weights` is given: as it is.
    """
    if weights is None and kv is None:
        return all_settings(duo=duo)
    baseline = Setting(duo=False)
    asked = Setting(duo=duo, weights=weights or "model", kv=kv or "model")
    return (baseline,) if asked == baseline else (baseline, asked)

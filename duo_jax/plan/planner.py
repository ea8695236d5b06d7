"""A plan: one row per setting, and the best row for a context."""

import dataclasses
from collections.abc import Sequence

from duo_jax.errors import InputError
from duo_jax.plan.estimate import Estimate, Workload, estimate
from duo_jax.plan.gpus import PlannedGpu
from duo_jax.plan.settings import Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What a setting takes on a GPU."""

    setting: Setting
    estimate: Estimate | None  # None: the model cannot have these formats
    longest: int | None  # tokens per row that fit; None: not even one


def plan(workload: Workload, settings: Sequence[Setting], gpu: PlannedGpu) -> tuple[PlanRow, ...]:
    """Estimate settings on a GPU.

    Raises:
      InputError: no setting fits at any length, or the model can have none of them.
    """
    rows, refusal = [], None
    for setting in settings:
        try:
            found = estimate(workload, setting)
        except InputError as error:
            rows.append(PlanRow(setting=setting, estimate=None, longest=None))
            refusal = error
            continue
        rows.append(PlanRow(setting=setting, estimate=found, longest=found.longest(gpu.budget)))
    # With two settings at most, the user asked for one; in a table of all, a row may be impossible.
    if refusal is not None and (len(settings) <= 2 or all(row.estimate is None for row in rows)):
        raise refusal
    if all(row.longest is None for row in rows):
        least = min((row.estimate for row in rows if row.estimate), key=lambda e: e.parts(1).total)
        raise InputError(
            f"nothing fits {gpus(workload, gpu)} at any length: {least.setting} take "
            f"{least.weights / 1e9:.2f} GB of weights and {least.parts(1).total / 1e9:.2f} GB in "
            f"all for a single token, of which {gpu.budget / 1e9:.2f} GB can be used"
        )
    return tuple(rows)


def gpus(workload: Workload, gpu: PlannedGpu) -> str:
    """Return the name of the GPUs, with their number if there are several."""
    return gpu.name if workload.devices == 1 else f"{workload.devices} x {gpu.name}"


def cheapest(rows: Sequence[PlanRow], context: int) -> PlanRow | None:
    """Return the first row that fits a context: settings are sorted by their loss of quality."""
    return next((row for row in rows if (row.longest or 0) >= context), None)

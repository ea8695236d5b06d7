"""The named cases of all ops."""

from collections.abc import Mapping

from kernels.case import AttentionCase, Case
from kernels.decode import cases as decode
from kernels.full import cases as full
from kernels.limits import MOSAIC_DTYPES, MOSAIC_HEAD_DIMS
from kernels.merge import cases as merge
from kernels.prefill import cases as prefill
from kernels.streaming import cases as streaming

Cases = Mapping[str, Mapping[str, Case]]  # by op and name

# Run by the tests, compiled for every GPU, checked on one.
CASES: Cases = {
    "decode": decode.CASES,
    "decode_packed": decode.PACKED,
    "full": full.CASES,
    "merge": merge.CASES,
    "prefill": prefill.CASES,
    "prefill_packed": prefill.PACKED,
    "streaming": streaming.CASES,
}
# Lengths where blocks and windows begin and end, in float32; run by the tests only.
AWKWARD: Cases = {
    "decode": decode.AWKWARD,
    "full": full.AWKWARD,
    "merge": merge.AWKWARD,
    "prefill": prefill.AWKWARD,
    "streaming": streaming.AWKWARD,
}


def named(cases: Cases = CASES) -> dict[str, Case]:
    """Return cases by "op: name"."""
    return {f"{op}: {name}": case for op, some in cases.items() for name, case in some.items()}


def served_by_mosaic(case: Case) -> bool:
    """Say whether a Mosaic kernel is written for a case.

    Packed keys are prefilled by the plain kernel, whose cases are others.
    """
    if not isinstance(case, AttentionCase) or case.gradient or case.dtype not in MOSAIC_DTYPES:
        return False
    if isinstance(case, prefill.PrefillCase) and case.bits is not None:
        return False
    by_bits = {None: MOSAIC_HEAD_DIMS, 8: (64, 96, 128), 4: (64, 128), 2: (64, 128)}
    return case.head_dim in by_bits[case.bits]

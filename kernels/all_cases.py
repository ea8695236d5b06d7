"""The named cases of all ops."""

from kernels.case import Case
from kernels.decode.cases import CASES as DECODE
from kernels.full.cases import CASES as FULL
from kernels.merge.cases import CASES as MERGE
from kernels.prefill.cases import CASES as PREFILL
from kernels.streaming.cases import CASES as STREAMING

CASES: dict[str, dict[str, Case]] = {
    "decode": dict(DECODE),
    "full": dict(FULL),
    "merge": dict(MERGE),
    "prefill": dict(PREFILL),
    "streaming": dict(STREAMING),
}

"""The named cases of all ops."""

from kernels.case import Case
from kernels.decode.cases import CASES as DECODE
from kernels.full.cases import CASES as FULL
from kernels.prefill.cases import CASES as PREFILL
from kernels.streaming.cases import CASES as STREAMING

CASES: dict[str, dict[str, Case]] = {
    "decode": dict(DECODE),
    "full": dict(FULL),
    "prefill": dict(PREFILL),
    "streaming": dict(STREAMING),
}

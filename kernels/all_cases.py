"""The named cases of all ops."""

from kernels.case import Case
from kernels.decode.cases import CASES as DECODE
from kernels.prefill.cases import CASES as PREFILL
from kernels.streaming.cases import CASES as STREAMING

CASES: dict[str, dict[str, Case]] = {
    "decode": dict(DECODE),
    "prefill": dict(PREFILL),
    "streaming": dict(STREAMING),
}

"""The named cases of all ops."""

from kernels.case import Case
from kernels.decode.cases import CASES as DECODE
from kernels.full.cases import CASES as FULL
from kernels.merge.cases import CASES as MERGE
from kernels.packed.cases import DECODE as DECODE_PACKED
from kernels.packed.cases import PREFILL as PREFILL_PACKED
from kernels.prefill.cases import CASES as PREFILL
from kernels.streaming.cases import CASES as STREAMING

CASES: dict[str, dict[str, Case]] = {
    "decode": dict(DECODE),
    "decode_packed": dict(DECODE_PACKED),
    "full": dict(FULL),
    "merge": dict(MERGE),
    "prefill": dict(PREFILL),
    "prefill_packed": dict(PREFILL_PACKED),
    "streaming": dict(STREAMING),
}

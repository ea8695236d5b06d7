"""A plan as plain text."""

from collections.abc import Sequence

from duo_jax.plan.estimate import Workload
from duo_jax.plan.gpus import PlannedGpu
from duo_jax.plan.planner import PlanRow, gpus

_HEADER = (
    ("caches", "weights", "KV", "longest", "weights", "full", "streaming", "work-", "peak"),
    ("", "", "", "context", "GB", "cache GB", "cache GB", "space GB", "GB"),
)
_FLOOR = ("decode", "floor")
_TEXT_COLUMNS = 3
LATENCIES = (10e-6, 20e-6)  # seconds of a small message between GPUs of one machine, assumed


def messages(num_layers: int) -> int:
    """Return the messages of a decode step: of each layer (serve.striped), and of both ends."""
    return 4 * num_layers + 2


def heading(workload: Workload, gpu: PlannedGpu, *, model: str, heads: str) -> str:
    """Return two lines about model, heads, GPU and workload."""
    memory, budget = gpu.memory / 1e9, gpu.budget / 1e9
    each = " each" if workload.devices > 1 else ""
    return (
        f"{model}, {heads}\n"
        f"{gpus(workload, gpu)}: {memory:.1f} GB of memory{each}, {budget:.1f} of them to be used; "
        f"batch {workload.batch_size}, chunk {workload.chunk:,}, {workload.dtype}"
    )


def floor_context(rows: Sequence[PlanRow], context: int | None) -> int:
    """Return the context at which decode floors are compared.

    It is the one that was asked for, or the longest of the first row that fits. At the longest
    context of each row all floors would be alike: the time to read the GPU's memory once.
    """
    return context or next(row.longest for row in rows if row.longest is not None)


def table(rows: Sequence[PlanRow], gpu: PlannedGpu, *, floors_at: int) -> str:
    """Return one line per setting, in gigabytes of 1e9 bytes, at the longest context that fits.

    Args:
      rows: the plan.
      gpu: its GPU.
      floors_at: context of the decode floors.
    """
    floors = () if gpu.bandwidth is None else (_FLOOR,)
    header = [(*line, *(floor[index] for floor in floors)) for index, line in enumerate(_HEADER)]
    lines = [*header, *(_cells(row, gpu, floors_at) for row in rows)]
    columns = len(header[0])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(columns)]
    return "\n".join(_align(line, widths) for line in lines)


def notes(rows: Sequence[PlanRow], workload: Workload, gpu: PlannedGpu, *, floors_at: int) -> str:
    """Explain the columns that need it."""
    text = ["longest context: tokens per row; peak: the larger of a decode step's and a chunk's"]
    if gpu.bandwidth is None:
        text.append("no decode floor: the memory bandwidth of this GPU is not known")
    else:
        text.append(
            f"decode floor: ms to read weights and caches once at {gpu.bandwidth / 1e9:,.0f} GB/s, "
            f"after {floors_at:,} tokens; a step writes "
            f"{workload.batch_size} token{'s' if workload.batch_size > 1 else ''}"
        )
    if workload.devices > 1:
        count = messages(workload.config.architecture.num_layers)
        least, more = (1e3 * count * seconds for seconds in LATENCIES)
        text.append(
            f"bytes are those of each GPU; a step also waits for {count} messages between them, "
            f"projected {least:.1f} to {more:.1f} ms at 10 to 20 us each (not measured)"
        )
    most = workload.config.architecture.max_positions
    if any(row.longest and row.longest > most for row in rows):
        text.append(f"* longer than the {most:,} tokens that the model was made for")
    return "\n".join(text)


def _cells(row: PlanRow, gpu: PlannedGpu, floors_at: int) -> tuple[str, ...]:
    setting = row.setting
    names = ("duo" if setting.duo else "full", setting.weights, setting.kv)
    if row.estimate is None:
        return (*names, "not possible with this model's sizes")
    if row.longest is None:
        return (*names, "does not fit")
    parts = row.estimate.parts(row.longest)
    beyond = row.longest > row.estimate.config.architecture.max_positions
    gigabytes = (parts.weights, parts.full_cache, parts.streaming_cache, parts.workspace)
    floor = ()
    if gpu.bandwidth is not None:
        seconds = row.estimate.decode_floor(floors_at, gpu.bandwidth)
        floor = (f"{1e3 * seconds:.2f}" if floors_at <= row.longest else "-",)
    return (
        *names,
        f"{row.longest:,}" + ("*" if beyond else " "),
        *(f"{x / 1e9:.2f}" for x in (*gigabytes, parts.total)),
        *floor,
    )


def _align(line: Sequence[str], widths: Sequence[int]) -> str:
    """Align words left and numbers right; a remark ends its line."""
    cells = [
        cell.ljust(width) if index < _TEXT_COLUMNS else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(line, widths, strict=False))
    ]
    if len(line) <= _TEXT_COLUMNS + 1:
        cells[-1] = line[-1]
    return "  ".join(cells).rstrip()

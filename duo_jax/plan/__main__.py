"""Command line of the planner."""

if __name__ == "__main__":  # a signal ends what follows in one line: jax takes seconds to import
    from duo_jax.process import startup

    startup.begin()


import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

from tqdm import tqdm

from duo_jax import cli, files
from duo_jax.cache import KVFormat
from duo_jax.checkpoints import gguf, pretrained
from duo_jax.cli.pattern import find_pattern
from duo_jax.errors import InputError
from duo_jax.heads.choose import split_heads
from duo_jax.mesh.devices import possible
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.plan import gpus, plot, table, verify
from duo_jax.plan.estimate import Workload
from duo_jax.plan.gpus import PlannedGpu
from duo_jax.plan.planner import PlanRow, cheapest, plan
from duo_jax.plan.planner import gpus as gpus_of
from duo_jax.plan.settings import chosen_settings
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count, Fraction

_DESCRIPTION = """\
Print the longest context that fits on a GPU, for every setting of caches and weights.

Needs a model's config.json and a pattern, but no weights and no GPU.
"""


_MOST_DEVICES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Flags of the command."""

    model: str = pretrained.DEMO
    """A config.json, a folder that holds one, a GGUF file, a hub name such as org/name, or "demo",
    the model that ships with duo_jax."""
    gpu: str = "a100-80g"
    """a100-40g, a100-80g, h100-80g, h200, or a number of gigabytes."""
    pattern: str | None = None
    """A pattern folder (python -m train.identify makes one), or "none" for full caches on every
    head, the model as published. Default: the folder "pattern" in the model's own folder, or the
    pattern that ships with duo_jax for this model."""
    sparsity: Fraction | None = None
    """Fraction of streaming heads, 0 to 1. Default: 0.5."""
    weights: WeightFormat | None = None
    """Plan this format of the layers' projections alone, beside the unquantised model. Default: the
    usual formats."""
    kv: KVFormat | None = None
    """Plan this format of the caches alone, beside the unquantised model. Default: the usual
    formats."""

    devices: Count = 1
    """GPUs of this kind that share the model and its caches."""
    batch: Count = 1
    """Texts that are served together."""
    chunk: Count = 8192
    """Tokens of a prompt that are read at a time; fewer take less workspace."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of weights, activations and caches, where they are not quantised."""
    context: Count | None = None
    """Also print which setting fits this many tokens per row with the least loss of quality."""
    verify: bool = False
    """Also compile the decode step and the reading of a chunk for the GPU, which need not be here,
    and compare. Takes minutes per row: choose one with --weights or --kv."""
    png: pathlib.Path | None = None
    """File for a picture of memory against context, for all settings."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.png is not None:
            files.check_file(self.png)


def run(flags: PlanConfig) -> None:
    """Print the plan.

    Raises:
      InputError: anything in the flags cannot be used, or nothing fits.
    """
    gpu = gpus.find(flags.gpu)
    file = pretrained.resolve_config(flags.model)
    folder = file if files.is_folder(file) or gguf.is_gguf(file) else file.parent
    architecture = pretrained.load_config(file)
    pattern = find_pattern(folder, architecture) if flags.pattern is None else flags.pattern
    split, _ = split_heads(architecture, pattern, sparsity=flags.sparsity)
    if flags.devices not in (fitting := possible(architecture, _MOST_DEVICES)):
        raise InputError(
            f"{flags.devices} GPUs cannot share this model's matrices evenly; possible: "
            f"{', '.join(map(str, fitting))}"
        )
    workload = Workload(
        config=split,
        dtype=flags.dtype,
        batch_size=flags.batch,
        chunk=flags.chunk,
        devices=flags.devices,
    )
    num_heads = architecture.num_layers * architecture.num_kv_heads
    duo = split.num_retrieval_heads < num_heads
    settings = chosen_settings(duo=duo, weights=flags.weights, kv=flags.kv)
    rows = plan(workload, settings, gpu)
    heads = f"no streaming heads of {num_heads}"
    if duo:
        heads = (
            f"{num_heads - split.num_retrieval_heads} of {num_heads} KV heads streaming (sparsity "
            f"{1 - split.num_retrieval_heads / num_heads:.2f}), "
            f"sink {split.sink_size}, recent {split.recent_size}"
        )
    print(table.heading(workload, gpu, model=_name(flags.model), heads=heads))
    floors_at = table.floor_context(rows, flags.context)
    print(f"\n{table.table(rows, gpu, floors_at=floors_at)}")
    print(f"\n{table.notes(rows, workload, gpu, floors_at=floors_at)}")
    if flags.context is not None:
        print(f"\n{_answer(rows, flags.context)}")
    if flags.png is not None:
        pattern = "its own pattern"
        if flags.pattern is not None:
            pattern = f"pattern {_name(flags.pattern)}"
        numbers = f"batch {flags.batch}, chunk {flags.chunk:,}, {flags.dtype}"
        title = f"{_name(flags.model)} on {gpus_of(workload, gpu)}, {numbers}\n{pattern}\n{heads}"
        files.write_bytes(flags.png, plot.png(rows, gpu, title=title))
        print(f"\nwritten: {flags.png}")
    if flags.verify:
        _verify(rows, gpu)


def _name(path: str) -> str:
    """Shorten a path to its last parts, which say what it is."""
    parts = [part for part in pathlib.PurePath(path).parts if part not in ("/", "config.json")]
    return "/".join(parts[-2:])


def _answer(rows: Sequence[PlanRow], context: int) -> str:
    row = cheapest(rows, context)
    if row is None:
        return f"{context:,} tokens: no setting fits"
    assert row.estimate is not None
    peak = row.estimate.parts(context).total / 1e9
    return f"{context:,} tokens: {row.setting} is what fits with the least loss ({peak:.2f} GB)"


def _verify(rows: Sequence[PlanRow], gpu: PlannedGpu) -> None:
    print(f"\ncompiled for {gpu.target} at the longest context, GB:")
    fitting = [row for row in rows if row.longest is not None]
    for row in tqdm(fitting, unit="row", disable=None, leave=False):
        assert row.estimate is not None
        assert row.longest is not None
        peaks = verify.compile_row(row.estimate, row.longest, target=gpu.target)
        estimate = row.estimate.parts(row.longest).total
        tqdm.write(
            f"{row.setting}, {row.longest:,} tokens: decode step {peaks.decode / 1e9:.2f}, chunk "
            f"{peaks.prefill / 1e9:.2f}, estimate {estimate / 1e9:.2f} "
            f"({100 * (estimate / peaks.peak - 1):+.2f}%)"
        )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        run,
        PlanConfig,
        prog="python -m duo_jax.plan",
        description=_DESCRIPTION,
        args=args,
    )


if __name__ == "__main__":
    main()

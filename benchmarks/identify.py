"""What one step of gate training costs, in forwards of the same model at the same length.

    python -m benchmarks.identify

Both are timed in turn in one run on a Llama-shaped model with random weights. Beside the measured
ratio stands the least that teacher mixing can cost, counted in floating-point operations: two
forwards of everything but attention (teacher, student), one full-attention forward (teacher),
streaming attention (student), and one backward pass of the student without weight gradients (as
many operations as its forward outside attention, twice its forward inside). Rematerialised layers
repeat the student's forward, which the floor does not count.
"""

import dataclasses
import functools
import json
import os
import pathlib
import platform
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from duo_jax import cli, files
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig, RopeConfig
from train.distillation import Batch
from train.optimisation import StepConfig, init_state, train_step

_TAIL = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Flags of the benchmark."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens per step."""
    layers: int = 2
    """Decoder layers."""
    embed: int = 1024
    """Model width; the MLP is 3.5 times as wide."""
    q_heads: int = 8
    """Query heads of 128 channels."""
    kv_heads: int = 2
    """KV heads."""
    sink: int = 128
    """Sinks of the streaming heads."""
    recent: int = 256
    """Recent tokens of the streaming heads."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of weights and activations."""
    repeats: int = 3
    """Timed rounds per length, after one that compiles; the median counts."""
    out: str = "benchmarks/results/identify"
    """Where to write .json and .png."""


def main(config: BenchmarkConfig) -> None:
    """Measure, print a table, write JSON and a picture."""
    model = _model(config)
    params = llama.init_params(model, jax.random.key(0), jnp.dtype(config.dtype))
    rows = [_measure(config, model, params, n) for n in tqdm(config.lengths, disable=None)]
    device = jax.devices()[0]
    result = {
        "command": "python -m benchmarks.identify",
        "settings": dataclasses.asdict(config),
        "mixing": "teacher",
        "hardware": f"{device.device_kind}, {_cores()} cores, {platform.machine()}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    out = pathlib.Path(config.out)
    files.make_folder(out.parent)
    files.write_text(out.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
    _plot(result, out.with_suffix(".png"))
    print(to_markdown(result))


def to_markdown(result: dict) -> str:
    """Write the rows as a table."""
    lines = [
        "| tokens | forward s | step s | step / forward | floor (FLOPs) | floor with remat |",
        "|--------|-----------|--------|----------------|---------------|------------------|",
    ]
    lines += [
        f"| {r['length']:,} | {r['forward_s']:.2f} | {r['step_s']:.2f} | {r['ratio']:.2f} "
        f"| {r['floor']:.2f} | {r['floor_remat']:.2f} |"
        for r in result["rows"]
    ]
    return "\n".join(lines)


def flops(model: ModelConfig, length: int, *, sink: int, recent: int) -> dict[str, float]:
    """Count the operations of one forward, 2 per multiply-add: linear maps and attention.

    Attention counts visible (query, key) pairs only: length * (length + 1) / 2 in full heads.
    """
    heads, head_dim = model.num_q_heads, model.head_dim
    per_token = model.embed_size * (2 * heads + 2 * model.num_kv_heads) * head_dim
    per_token += 3 * model.embed_size * model.mlp_size
    seen = [min(i + 1, recent + min(sink, max(0, i + 1 - recent))) for i in range(length)]
    per_pair = 4 * heads * head_dim * model.num_layers
    return {
        "linear": 2.0 * length * per_token * model.num_layers,
        "full_attention": per_pair * length * (length + 1) / 2,
        "streaming_attention": float(per_pair * sum(seen)),
    }


def _model(config: BenchmarkConfig) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=1024,
        embed_size=config.embed,
        mlp_size=config.embed * 7 // 2,
        num_layers=config.layers,
        num_q_heads=config.q_heads,
        num_kv_heads=config.kv_heads,
        head_dim=128,
        norm_eps=1e-5,
        max_positions=1 << 20,
        rope=RopeConfig(theta=500_000.0),
    )


def _measure(config: BenchmarkConfig, model: ModelConfig, params, length: int) -> dict[str, float]:
    step_config = StepConfig(
        num_steps=1000,
        learning_rate=0.02,
        reg_weight=0.05,
        target_sparsity=None,
        sink_size=config.sink,
        recent_size=config.recent,
        mixing="teacher",
        tail_size=min(_TAIL, length // 2),
    )
    tokens = np.random.default_rng(length).integers(0, model.vocab_size, (1, length), np.int32)
    batch = Batch(
        tokens=jnp.asarray(tokens),
        tail_start=jnp.array([length - step_config.tail_size]),
        total_length=jnp.array([length]),
    )
    forward = jax.jit(lambda params, tokens: llama.hidden_states(model, params, tokens)[0])
    step = jax.jit(functools.partial(train_step, architecture=model, step=step_config))
    state = init_state(model, step_config)
    calls = {
        "forward_s": lambda: forward(params, batch.tokens),
        "step_s": lambda: step(state, params, batch),
    }
    times = {name: [] for name in calls}
    for _ in range(config.repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - began)
    row = {name: float(np.median(seconds[1:])) for name, seconds in times.items()}

    count = flops(model, length, sink=config.sink, recent=config.recent)
    linear, full = count["linear"], count["full_attention"]
    streaming = count["streaming_attention"]
    floor = 3 * linear + full + 3 * streaming
    return {
        "length": length,
        **row,
        "ratio": row["step_s"] / row["forward_s"],
        "forward_flops": linear + full,
        "floor_flops": floor,
        "floor": floor / (linear + full),
        "floor_remat": (floor + linear + streaming) / (linear + full),
    }


def _cores() -> int:
    """Count the cores this process may use (fewer than the machine's under taskset)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plot(result: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    lengths = [r["length"] for r in rows]
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.plot(lengths, [r["ratio"] for r in rows], "o-", label="measured")
    axes.plot(lengths, [r["floor"] for r in rows], "s--", label="least possible (FLOPs)")
    axes.plot(
        lengths, [r["floor_remat"] for r in rows], "^:", label="with rematerialised layers (FLOPs)"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("cost of a step, in plain forwards")
    axes.set_title(
        f"One step of gate training\n{result['hardware']}, jax {result['jax']}, "
        f"{result['settings']['dtype']}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(
        main,
        BenchmarkConfig,
        prog="python -m benchmarks.identify",
        description=__doc__.split("\n\n")[0],
    )

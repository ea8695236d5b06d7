"""Cost of one step of gate training, in forwards of the same model at the same length.

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
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import columns, command
from benchmarks.columns import Column
from benchmarks.serving import floors, report, timing
from duo_jax import files
from duo_jax.heads.split import DuoConfig
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig, RopeConfig
from duo_jax.reports import figures, machine
from train.distillation import Batch
from train.optimisation import StepConfig, init_state, train_step

_TAIL = 512
_COLUMNS = (
    Column("tokens", "length", "{:,}"),
    Column("forward s", "forward_s", "{:.2f}"),
    Column("step s", "step_s", "{:.2f}"),
    Column("step / forward", "ratio", "{:.2f}"),
    Column("floor (FLOPs)", "floor", "{:.2f}"),
    Column("floor with remat", "floor_remat", "{:.2f}"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentifyFlags:
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
    out: pathlib.Path = pathlib.Path("benchmarks/results/identify")
    """Where to write .json and .png."""

    @property
    def architecture(self) -> ModelConfig:
        """The model that is trained on."""
        return ModelConfig(
            family="llama",
            vocab_size=1024,
            embed_size=self.embed,
            mlp_size=self.embed * 7 // 2,
            num_layers=self.layers,
            num_q_heads=self.q_heads,
            num_kv_heads=self.kv_heads,
            head_dim=128,
            norm_eps=1e-5,
            max_positions=1 << 20,
            rope=RopeConfig(theta=500_000.0),
        )


def main(flags: IdentifyFlags) -> None:
    """Measure, print a table, write JSON and a picture."""
    environment = machine.environment()
    params = llama.init_params(flags.architecture, jax.random.key(0), jnp.dtype(flags.dtype))
    result = {
        "command": machine.command("benchmarks.identify"),
        "settings": machine.to_json(flags),
        "mixing": "teacher",
        **environment,
        "rows": [_measure(flags, params, length) for length in tqdm(flags.lengths, disable=None)],
    }
    files.make_folder(flags.out.parent)
    files.write_text(flags.out.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
    _plot(result, flags.out.with_suffix(".png"))
    print(to_markdown(result))


def to_markdown(result: dict[str, Any]) -> str:
    """Write the rows as a table."""
    return columns.table(_COLUMNS, result["rows"])


def flops(model: ModelConfig, length: int, *, sink: int, recent: int) -> dict[str, float]:
    """Count the operations of one forward, 2 per multiply-add: linear maps and attention.

    Attention counts visible (query, key) pairs only.
    """
    streaming = DuoConfig(
        architecture=model,
        retrieval_counts=(0,) * model.num_layers,
        sink_size=sink,
        recent_size=recent,
    )
    full = floors.prefill_flops(streaming.all_retrieval(), length=length)
    return {
        "linear": full["linear"],
        "full_attention": full["attention"],
        "streaming_attention": floors.prefill_flops(streaming, length=length)["attention"],
    }


def self_mixing_flops(model: ModelConfig, length: int, *, sink: int, recent: int) -> float:
    """Count the least operations of a gradient with mixing "self", remat and all tokens' logits.

    Two forwards of linear maps and both attentions, and a backward pass without weight gradients.
    """
    count = flops(model, length, sink=sink, recent=recent)
    logits = 2.0 * length * model.embed_size * model.vocab_size
    attention = count["full_attention"] + count["streaming_attention"]
    return 3 * (count["linear"] + logits) + 4 * attention


def _measure(flags: IdentifyFlags, params: dict[str, Any], length: int) -> dict[str, float]:
    architecture = flags.architecture
    step = StepConfig(
        num_steps=1000,
        learning_rate=0.02,
        reg_weight=0.05,
        target_sparsity=None,
        sink_size=flags.sink,
        recent_size=flags.recent,
        mixing="teacher",
        tail_size=min(_TAIL, length // 2),
    )
    tokens = np.random.default_rng(length).integers(
        0, architecture.vocab_size, (1, length), np.int32
    )
    batch = Batch(
        tokens=jnp.asarray(tokens),
        tail_start=jnp.array([length - step.tail_size]),
        total_length=jnp.array([length]),
    )
    forward = jax.jit(lambda params, tokens: llama.hidden_states(architecture, params, tokens)[0])
    train = jax.jit(functools.partial(train_step, architecture=architecture, step=step))
    state = init_state(architecture, step)
    calls = {
        "forward_s": lambda: jax.block_until_ready(forward(params, batch.tokens)),
        "step_s": lambda: jax.block_until_ready(train(state, params, batch)),
    }
    timing.interleaved(calls, rounds=1)  # compiles
    seconds = timing.interleaved(calls, rounds=flags.repeats)
    times = {name: timing.summary(of_call)["median"] for name, of_call in seconds.items()}

    count = flops(architecture, length, sink=flags.sink, recent=flags.recent)
    linear, full = count["linear"], count["full_attention"]
    streaming = count["streaming_attention"]
    floor = 3 * linear + full + 3 * streaming
    return {
        "length": length,
        **times,
        "ratio": times["step_s"] / times["forward_s"],
        "forward_flops": linear + full,
        "floor_flops": floor,
        "floor": floor / (linear + full),
        "floor_remat": (floor + linear + streaming) / (linear + full),
    }


def _plot(result: dict[str, Any], path: pathlib.Path) -> None:
    rows = result["rows"]
    lengths = [row["length"] for row in rows]
    figure, axes = figures.new_figure(6.4, 4.0)
    for key, style, label in (
        ("ratio", "o-", "measured"),
        ("floor", "s--", "least possible (FLOPs)"),
        ("floor_remat", "^:", "with rematerialised layers (FLOPs)"),
    ):
        axes.plot(lengths, [row[key] for row in rows], style, label=label)
    report.token_axis(axes, lengths)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("cost of a step, in plain forwards")
    axes.set_title(report.title(result, "One step of gate training"), fontsize=10)
    figures.save(figure, path, dpi=150)


if __name__ == "__main__":
    command.run(main, IdentifyFlags)

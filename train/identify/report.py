"""The report of an identification: retrieval with the pattern, without it, and with random ones."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from duo_jax import files
from duo_jax.data.passkey_templates import in_words
from duo_jax.heads.pattern import Pattern, choose_retrieval_heads, random_heads
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from duo_jax.reports import machine, markdown
from duo_jax.reports.statistics import standard_error, with_error
from train.retrieval_test import RetrievalScores, RetrievalTest

_FEW = 0.1  # of the passkeys: what the model itself finds less of tells nothing about its heads
_NAMES = {  # of heads that were not learned
    "profile": "profiled",
    "reconstruct": "reconstructing",
    "attribute": "attributed",
}
_MEASURES = {"tokens": "tokens right", "nll": "answer NLL", "kl": "KL from full"}
_EXPLAINED = (
    "Tokens right: fraction of the passkeys' tokens that are the most likely one after the true "
    "ones. Answer NLL: nats",
    "per token. KL from full: of the distribution with full attention from this one, nats per "
    "token. ±: two standard",
    "errors over samples.",
)


def make(
    *,
    name: str,
    config: dict[str, Any],
    architecture: ModelConfig,
    params: llama.Params,
    pattern: Pattern,
    test: RetrievalTest | None,
    itself: RetrievalScores | None,
    sparsities: Sequence[float],
    random_seeds: int,
) -> dict[str, Any]:
    """Measure a pattern.

    Args:
      name: the model's.
      config: the run's flags, repeated in the report.
      architecture: the model.
      params: its parameters.
      pattern: the gates (or scores) and the streaming sizes they were found with.
      test: held-out samples; None leaves the retrieval table empty.
      itself: the model's own scores on them.
      sparsities: fractions of streaming heads to test.
      random_seeds: random head choices per sparsity.
    """
    gates = pattern.clipped()
    report = {
        "model": {
            "name": name,
            "family": architecture.family,
            "layers": architecture.num_layers,
            "kv_heads": architecture.num_kv_heads,
            "q_heads": architecture.num_q_heads,
            "head_dim": architecture.head_dim,
        },
        "gates": {
            "mean": float(gates.mean()),
            "above_half": float((gates > 0.5).mean()),
            "at_zero": int((gates == 0).sum()),
            "at_one": int((gates == 1).sum()),
            "above_half_per_layer": (gates > 0.5).sum(axis=1).tolist(),
        },
        "retrieval": [],
        "environment": machine.environment(),
        "config": config,
    }
    if test is not None and itself is not None:
        report["warning"] = warning(itself, config["data"])
        report["samples"] = {
            "count": len(test.samples),
            "passkeys": sum(len(s.answers) for s in test.samples),
            "length": test.length,
            "haystack": test.haystack,
        }
        name = _NAMES.get(config["method"], "learned")
        report["retrieval"] = _retrieval(
            name, architecture, params, pattern, test, itself, sparsities, random_seeds
        )
    return report


def warning(itself: RetrievalScores, data: Mapping[str, Any]) -> str | None:
    """Say so in a line if the model itself finds too few passkeys, and what to change.

    Args:
      itself: its scores with full attention.
      data: the fields of PasskeyConfig.
    """
    if itself.exact.mean() >= _FEW:
        return None
    changes = [] if data["words"] == "digits" else ["--words digits"]
    numbers = {"--passkey-words": data["passkey_words"], "--num-passkeys": data["num_passkeys"]}
    changes += [f"fewer {flag} than {value}" for flag, value in numbers.items() if value > 1]
    changes.append(f"a shorter --max-length than {data['max_length']:,}")
    return (
        f"with full attention the model itself retrieves {itself.exact.mean():.1%} of these "
        f"passkeys (answer NLL {itself.nll.mean():.2f} nats per token): they hardly tell its heads "
        f"apart. Try {', '.join(changes[:-1])}{' or ' if changes[:-1] else ''}{changes[-1]}"
    )


def save(report: dict[str, Any], folder: pathlib.Path) -> None:
    """Write report.json, then report.md, whose presence says that the run is complete."""
    files.write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    files.write_text(folder / "report.md", to_markdown(report))


def to_markdown(report: dict[str, Any]) -> str:
    """Write the report as Markdown that also reads well in a terminal."""
    model, gates, config = report["model"], report["gates"], report["config"]
    what = "Scores" if config["method"] in _NAMES else "Gates"
    if config["method"] == "attribute":
        what = "Places by credit"
    lines = [
        f"# Retrieval heads of {model['name']}",
        "",
        *([f"**Careful**: {report['warning']}.", ""] if report.get("warning") else []),
        f"{model['layers']} layers x {model['kv_heads']} KV heads ({model['q_heads']} query heads "
        f"of {model['head_dim']}); {_how(config)}, "
        f"sink {config['sink']}, recent {config['recent']}, seed {config['seed']}.",
        f"{what}: mean {gates['mean']:.3f}, {gates['above_half']:.1%} above 0.5, "
        f"{gates['at_zero']} at 0, {gates['at_one']} at 1; above 0.5 per layer: "
        f"{' '.join(map(str, gates['above_half_per_layer']))}.",
        "",
    ]
    if report["retrieval"]:
        samples = report["samples"]
        measured = [name for name in _MEASURES if name in report["retrieval"][-1]]
        columns = ("heads", "streaming", "retrieval heads", "KV kept", "exact retrieval")
        rows = [
            (
                r["heads"],
                f"{100 * r['sparsity']:g}%",
                f"{r['retrieval_heads']} of {r['all_heads']}",
                f"{r['kv_bytes_kept']:.1%}",
                _exact(r),
                *(_measure(r, name) for name in measured),
            )
            for r in report["retrieval"]
        ]
        lines += [
            f"{samples['count']} held-out samples of {samples['length']:,} tokens, "
            f"{samples['passkeys']} passkeys in all, of "
            f"{in_words(config['data']['words'], config['data']['passkey_words'])}; "
            f"haystack: {samples['haystack']}.",
            "",
            markdown.table((*columns, *(_MEASURES[name] for name in measured)), rows, aligned=True),
            "",
            "Exact retrieval: every token of the passkey right, as greedy decoding would write it. "
            "KV kept: bytes of",
            "both caches at this length, against full caches for all heads.",
            *(_EXPLAINED if measured else []),
            "",
        ]
    environment = ", ".join(
        f"{k} {v}" for k, v in report["environment"].items() if k != "load_before"
    )
    seconds = report.get("seconds", {})
    for key, what in (("per_training_step", "training step"), ("per_sample", "sample")):
        if seconds.get(key):
            lines.append(f"A {what} took {seconds[key]:.3f} s (median). ")
    if seconds:
        lines.append(f"The whole command took {seconds['whole_command']:.0f} s. ")
    lines.append(f"Where it ran: {environment}.")
    return "\n".join(lines) + "\n"


def _exact(row: dict[str, Any]) -> str:
    """Write exact retrieval, with two standard errors, and the range of several runs."""
    mean, error, spread = f"{row['accuracy']:.1%}", row.get("accuracy_error"), ""
    if error is not None:
        mean = with_error(mean, 200 * error, digits=1)
    if row["runs"] > 1:
        spread = f" (mean of {row['runs']}: {row['lowest']:.1%} to {row['highest']:.1%})"
    return f"{mean}{spread}"


def _measure(row: dict[str, Any], name: str) -> str:
    """Write a mean and two standard errors."""
    if row[name] is None:
        return "-"
    if name == "tokens":
        mean, scale, digits = f"{row[name]:.1%}", 200, 1
    else:
        mean, scale, digits = f"{row[name]:.3f}", 2, 3
    error = row[f"{name}_error"]
    return mean if error is None else with_error(mean, scale * error, digits=digits)


def _how(config: dict[str, Any]) -> str:
    """Say in a few words how the heads were told apart."""
    if config["method"] == "profile":
        return f"attention profile of {config['profile_samples']} samples"
    if config["method"] == "reconstruct":
        return f"reconstruction of {config['profile_samples']} texts"
    steps = f"{config['num_steps']} steps, mixing {config['mixing']}"
    if config["method"] == "attribute":
        lowest = 1 - config["target_sparsity"]
        read = {"passkeys": "answers", "text": "text", "both": "text and answers"}
        credited = f"the {read[config['learn_from']]}"
        if config["objective"] == "divergence":
            credited = f"the divergence of {credited} from full attention"
        votes = "equal votes, " if config["votes"] == "equal" else ""
        return f"credits of {credited} along gates from 1 to {lowest:g}, {votes}{steps}"
    if config["method"] == "budget":
        return f"gates under a budget for {config['target_sparsity']:.1%} streaming, {steps}"
    if config["method"] == "masks":
        read = {"both": "text and passkeys"}.get(config["learn_from"], config["learn_from"])
        return f"masks for {config['target_sparsity']:.1%} streaming on {read}, {steps}"
    if config["method"] == "lm":
        return f"gates by language-modelling loss, {steps}"
    return f"gates by the paper's distillation, {steps}"


def _retrieval(
    name: str,
    architecture: ModelConfig,
    params: llama.Params,
    pattern: Pattern,
    test: RetrievalTest,
    itself: RetrievalScores,
    sparsities: Sequence[float],
    random_seeds: int,
) -> list[dict[str, Any]]:
    """Test the pattern and its rivals; return a row for each."""
    shape = pattern.gates.shape
    trials: list[tuple[str, float, list[Bool[np.ndarray, "layers kv_heads"]]]] = [
        ("all retrieval (the model itself)", 0.0, [np.ones(shape, bool)])
    ]
    for sparsity in sparsities:
        found = choose_retrieval_heads(pattern.gates, sparsity=sparsity)
        trials.append((name, sparsity, [found]))
        shuffled = [random_heads(found, seed=seed) for seed in range(random_seeds)]
        if shuffled:
            trials.append(("random", sparsity, shuffled))
    trials.append(("all streaming", 1.0, [np.zeros(shape, bool)]))

    sizes = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    rows = []
    total = sum(len(masks) for _, _, masks in trials)
    with tqdm(total=total, desc="report", unit="pattern", disable=None) as bar:
        for heads_of, sparsity, masks in trials:
            scores = []
            for heads in masks:
                known = itself if heads.all() else None
                scores.append(
                    known or test.scores(architecture, params, heads, **sizes, reference=itself)
                )
                bar.update()
            kept = int(masks[0].sum())
            streaming_share = min(1.0, (pattern.sink_size + pattern.recent_size) / test.length)
            means = [float(s.exact.mean()) for s in scores]
            rows.append(
                {
                    "heads": heads_of,
                    "sparsity": sparsity,
                    "retrieval_heads": kept,
                    "all_heads": masks[0].size,
                    "kv_bytes_kept": (kept + (masks[0].size - kept) * streaming_share)
                    / masks[0].size,
                    "accuracy": float(np.mean(means)),
                    "accuracy_error": _error([s.exact for s in scores]),
                    "lowest": min(means),
                    "highest": max(means),
                    "runs": len(scores),
                }
                | _means(scores)
            )
    return rows


def _means(scores: Sequence[RetrievalScores]) -> dict[str, float | None]:
    """Return the mean of each measure, and its standard error; None where there is none."""
    means: dict[str, float | None] = {}
    for name in _MEASURES:
        values = [getattr(s, name) for s in scores]
        absent = any(value is None for value in values)
        means[name] = None if absent else float(np.mean(values))
        means[f"{name}_error"] = None if absent else _error(values)
    return means


def _error(values: Sequence[Float[np.ndarray, "samples passkeys"]]) -> float | None:
    """Return the standard error over samples: a sample's passkeys, and all runs, are averaged."""
    error = standard_error(np.mean(values, axis=(0, 2)))
    return None if np.isnan(error) else error  # of one sample, which JSON has no nan for

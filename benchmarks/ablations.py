"""The paper's ablations (section 3.5) on the demo model: methods, windows and their sizes.

    python -m benchmarks.ablations

Exact retrieval of passkeys on held-out text (train.retrieval_test), over the fraction of streaming
heads:

(a) how heads are chosen: by every method of `python -m train.identify`, and at random. Methods that
    take a target are run for each sparsity by itself;
(b) what streaming heads see: sinks and recent tokens, sinks only, recent tokens only, each with the
    same number of slots. A query always sees its own token, so "sinks only" is recent 1. Measured
    twice: heads identified with the window they are deployed with, and heads identified with
    sinks and recent tokens that are only deployed so;
(c) deployed sizes: heads identified with the preset's sinks and recent tokens, deployed with
    others.

Samples, steps and sizes are those of the model's preset (identify.json), but for the steps of
masks, which need more, and for the weight of the penalty with the language-modelling loss: the
preset's was chosen for distillation, whose loss has another scale, and would close nearly all
gates.

Each identification has a work folder of its own, so a killed run goes on where it was.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from benchmarks import command
from benchmarks.quality import ablations_report
from duo_jax import files
from duo_jax.checkpoints import pretrained
from duo_jax.data.documents import load_documents, split_held_out, text_digest
from duo_jax.data.passkeys import PasskeySampler
from duo_jax.errors import InputError
from duo_jax.heads.pattern import choose_retrieval_heads, random_heads
from duo_jax.reports import machine, statistics
from duo_jax.session.runtime import digest_of
from train.identify.flags import Method, default_config
from train.identify.run import find_heads
from train.retrieval_test import RetrievalTest
from train.workdir import WorkDir

Gates = Float[np.ndarray, "layers kv_heads"]

TARGETED: tuple[Method, ...] = ("budget", "masks", "attribute")
UNTARGETED: tuple[Method, ...] = ("optimise", "profile", "reconstruct", "lm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationsFlags:
    """Flags of the benchmark."""

    model: str = pretrained.DEMO
    """A model that brings an identify.json."""
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75, 0.875)
    """Fractions of streaming heads of (a) and (b)."""
    sinks: tuple[int, ...] = (0, 4, 16, 32)
    """Deployed sinks of (c)."""
    recents: tuple[int, ...] = (8, 32, 64, 128)
    """Deployed recent tokens of (c)."""
    grid_sparsities: tuple[float, ...] = (0.5, 0.75)
    """Fractions of streaming heads of (c)."""
    seeds: int = 3
    """Seeds of identification in (a): 0, 1, ...; (b) and (c) take the first."""
    random_seeds: int = 8
    """Random choices of heads per sparsity in (a)."""
    lm_reg_weight: float = 0.05
    """Weight of the penalty with the language-modelling loss; the paper's."""
    mask_steps: int = 400
    """Steps of --method masks."""
    samples: int = 32
    """Held-out texts of the preset's longest length."""
    workdir: pathlib.Path | None = None
    """Folder of the identifications; the same command goes on in it. Default:
    runs/ablations-MODEL."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/ablations.json")
    """Where to write the result; .md and .png stand beside it."""

    def __post_init__(self) -> None:
        if min(self.samples, self.seeds, self.random_seeds, self.mask_steps) < 1:
            raise InputError("samples, seeds, random_seeds and mask_steps must be at least 1")
        for name in ("sparsities", "grid_sparsities", "sinks", "recents"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty")
        for sparsity in (*self.sparsities, *self.grid_sparsities):
            if not 0.0 <= sparsity <= 1.0:
                raise InputError(f"sparsity {sparsity} is not in [0, 1]")
        if min(self.sinks) < 0 or min(self.recents) < 1:
            raise InputError("sinks must be at least 0 and recents at least 1")

    def folder(self) -> pathlib.Path:
        """Return the work folder."""
        name = pathlib.PurePath(self.model.rstrip("/")).name
        return self.workdir or pathlib.Path(f"runs/ablations-{name}")


def main(flags: AblationsFlags) -> None:
    """Measure, write the results, draw them and print the tables."""
    result = measure(flags)
    files.make_folder(flags.out.parent)
    files.write_text(flags.out, json.dumps(result, indent=2) + "\n")
    table = ablations_report.to_markdown(result)
    files.write_text(flags.out.with_suffix(".md"), table)
    ablations_report.plot(result, flags.out.with_suffix(".png"))
    print(table)


def measure(flags: AblationsFlags) -> dict[str, Any]:
    """Measure all three panels."""
    began, environment = time.monotonic(), machine.environment()
    lab = _Lab(flags)
    with lab.bar:
        methods, gates = _methods(lab, flags)
        learned = _of(gates, "optimise", None)[0]
        windows = _windows(lab, flags, learned)
        sizes = _sizes(lab, flags, learned)
        full, streaming = (
            lab.exact(np.full(lab.shape, keep), sink=lab.preset.sink, recent=lab.preset.recent)
            for keep in (True, False)
        )
    preset = dataclasses.asdict(lab.preset)
    return {
        "command": machine.command("benchmarks.ablations"),
        "settings": machine.to_json(flags),
        **environment,
        "model": flags.model,
        "layers": lab.model.num_layers,
        "kv_heads": lab.model.num_kv_heads,
        "identification": {
            k: preset[k]
            for k in ("num_steps", "profile_samples", "reg_weight", "mixing", "sink", "recent",
                      "dtype", "data")
        },
        "length": lab.test.length,
        "passkeys": sum(len(sample.answers) for sample in lab.test.samples),
        "haystack": lab.test.haystack,
        "largest_standard_error": lab.largest_error,
        "run_minutes": round((time.monotonic() - began) / 60, 1),
        "full": full,
        "all_streaming": streaming,
        "methods": methods,
        "windows": windows,
        "sizes": sizes,
        "gates": gates,
    }  # fmt: skip


def _methods(lab: "_Lab", flags: AblationsFlags) -> tuple[list[dict[str, Any]], ...]:
    """Panel (a): rows, and the gates of every method, target and seed."""
    cases: list[tuple[Method, float | None]] = [
        *((method, None) for method in UNTARGETED),
        *((method, sparsity) for method in TARGETED for sparsity in flags.sparsities),
    ]
    gates = [
        {
            "method": method,
            "target": target,
            "seed": seed,
            "gates": lab.identify(method, target=target, seed=seed).tolist(),
        }
        for method, target in cases
        for seed in range(flags.seeds)
    ]
    sizes = {"sink": lab.preset.sink, "recent": lab.preset.recent}
    rows = []
    for sparsity in flags.sparsities:
        chosen: dict[str, list[Bool[np.ndarray, "layers kv_heads"]]] = {
            method: [
                choose_retrieval_heads(found, sparsity=sparsity)
                for found in _of(gates, method, target)
            ]
            for method, target in cases
            if target in (None, sparsity)
        }
        heads = chosen["optimise"][0]
        chosen["random"] = [random_heads(heads, seed=seed) for seed in range(flags.random_seeds)]
        for method, masks in chosen.items():
            rows.append(
                {
                    "method": method,
                    "sparsity": sparsity,
                    "retrieval_heads": int(heads.sum()),
                    "exact": [lab.exact(mask, **sizes) for mask in masks],
                }
            )
    return rows, gates


def _of(gates: list[dict[str, Any]], method: Method, target: float | None) -> list[Gates]:
    """Return the gates of every seed."""
    wanted = (method, target)
    return [np.array(row["gates"]) for row in gates if (row["method"], row["target"]) == wanted]


def _windows(lab: "_Lab", flags: AblationsFlags, learned: Gates) -> list[dict[str, Any]]:
    """Panel (b): rows for every kind of window, identified with it or with both."""
    sink, recent = lab.preset.sink, lab.preset.recent
    slots = sink + recent
    windows = {"both": (sink, recent), "sinks": (slots - 1, 1), "recents": (0, slots)}
    identified = {
        name: learned if name == "both" else lab.identify("optimise", sink=size[0], recent=size[1])
        for name, size in windows.items()
    }
    pairs = [(name, name) for name in windows] + [("both", "sinks"), ("both", "recents")]
    return [
        {
            "identified": identified_with,
            "deployed": deployed,
            "sink": windows[deployed][0],
            "recent": windows[deployed][1],
            "sparsity": sparsity,
            "exact": lab.exact(
                choose_retrieval_heads(identified[identified_with], sparsity=sparsity),
                sink=windows[deployed][0],
                recent=windows[deployed][1],
            ),
        }
        for identified_with, deployed in pairs
        for sparsity in flags.sparsities
    ]


def _sizes(lab: "_Lab", flags: AblationsFlags, learned: Gates) -> list[dict[str, Any]]:
    """Panel (c): rows of the grid of deployed sizes."""
    return [
        {
            "sparsity": sparsity,
            "sink": sink,
            "recent": recent,
            "exact": lab.exact(
                choose_retrieval_heads(learned, sparsity=sparsity), sink=sink, recent=recent
            ),
        }
        for sink in flags.sinks
        for recent in flags.recents
        for sparsity in flags.grid_sparsities
    ]


class _Lab:
    """A loaded model, with which heads are identified and tested."""

    def __init__(self, flags: AblationsFlags) -> None:
        folder = pretrained.resolve(flags.model)
        self._defaults = default_config(flags.model, folder)
        self.preset = self._defaults.resolved()
        self.model = pretrained.load_config(folder)
        self.shape = (self.model.num_layers, self.model.num_kv_heads)
        self.largest_error = 0.0  # standard error over texts of any number measured
        self.bar = tqdm(desc="identified or tested", unit="", disable=None)
        self._folder = flags.folder()
        self._changes: dict[Method, dict[str, Any]] = {
            "lm": {"reg_weight": flags.lm_reg_weight},
            "masks": {"num_steps": flags.mask_steps},
        }
        self._params = pretrained.load_params(folder, dtype=jnp.dtype(self.preset.dtype))
        self._tokenizer = pretrained.load_tokenizer(folder)
        documents = load_documents(())
        self._text_digest = text_digest(documents)
        self._weights_digest = digest_of(self._params)
        self._training_text, held_out_text = split_held_out(documents)
        self.test = RetrievalTest(
            self.preset.data,
            self._tokenizer,
            self._training_text,
            held_out_text,
            num_samples=flags.samples,
            seed=0,
        )

    def identify(
        self, method: Method, *, target: float | None = None, seed: int = 0, **changes: int
    ) -> Gates:
        """Return the gates (or scores) that `python -m train.identify` would write."""
        values = {"method": method, "target_sparsity": target, "seed": seed, **changes}
        config = dataclasses.replace(
            self._defaults, **values, **self._changes.get(method, {})
        ).resolved()
        sampler = PasskeySampler(config.data, self._tokenizer, self._training_text, seed=seed)
        sizes = f"sink-{config.sink}-recent-{config.recent}"
        folder = self._folder / f"{method}-{target}-seed-{seed}-{sizes}"
        settings = dataclasses.asdict(config) | {
            "weights_digest": self._weights_digest,
            "text_digest": self._text_digest,
        }
        with contextlib.closing(WorkDir(folder, settings, operational=())) as workdir:
            gates, _ = find_heads(config, self.model, self._params, sampler, workdir)
        self.bar.update()
        return np.asarray(gates, np.float64)

    def exact(self, heads: Bool[np.ndarray, "layers kv_heads"], *, sink: int, recent: int) -> float:
        """Return the fraction of passkeys that are retrieved exactly with these heads."""
        found = self.test.accuracy(
            self.model, self._params, heads, sink_size=sink, recent_size=recent
        )
        texts = found.mean(axis=1)  # passkeys of one text hang together
        self.largest_error = max(self.largest_error, statistics.standard_error(texts))
        self.bar.update()
        return float(found.mean())


if __name__ == "__main__":
    command.run(main, AblationsFlags)

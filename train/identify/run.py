"""Identification from start to end: load, train (or resume), save the pattern, report."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from duo_jax import files
from duo_jax.checkpoints import pretrained
from duo_jax.cli.workdir import check as check_workdir
from duo_jax.data.documents import load_documents, split_held_out, text_digest
from duo_jax.data.passkeys import PasskeySampler
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, save_pattern
from duo_jax.mesh import devices
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from duo_jax.schema import checksums
from duo_jax.session.runtime import digest_of
from duo_jax.session.tokenization import load_tokenization
from train.identify import plots, profile, reconstruct, report, training
from train.identify.flags import IdentifyConfig, default_config
from train.retrieval_test import RetrievalTest
from train.workdir import WorkDir

_MESSAGE = "Here is a text."  # anything that a chat template writes as it is

_UNTRAINED = ("profile", "reconstruct")  # methods that score heads, one sample a step
_VALUES = {  # of heads that were not learned, in pictures
    "profile": "attention far back",
    "reconstruct": "attention while the text is repeated",
    "attribute": "order by credit",
}

# Fields that may differ when a run is resumed: they do not change its result.
_OPERATIONAL = ("workdir", "checkpoint_every", "tensorboard", "devices")
_WEIGHTS = "weights_digest"  # among the settings
_KEPT = {  # beside a pattern, where its method reads them; named as in published ones
    "lr": "learning_rate",
    "reg_weight": "reg_weight",
    "target_sparsity": "target_sparsity",
    "mixing": "mixing",
    "data": "learn_from",
    "objective": "objective",
    "votes": "votes",
    "num_steps": "num_steps",
    "num_samples": "profile_samples",
    "min_passkeys": "min_passkeys",
}


def identify(flags: IdentifyConfig) -> None:
    """Find the retrieval heads of a model and write everything a person wants to see of them.

    Writes to the work folder: config.json, metrics.jsonl, checkpoints/, pattern/ (gates in the
    published file format), gates.png, history.png (of training),
    retrieval.png (of the tests), report.json and report.md; prints
    the report.
    A second call resumes, or repeats the printed report if all is done. Several targets have a work
    folder each, within the command's own.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    if flags.target_sparsities:
        for run in flags.runs():
            identify(run)
        return
    started = time.monotonic()
    if flags.tensorboard:
        training.summary_writer()
    folder = pretrained.resolve(flags.model)
    flags.check_method(default_config(flags.model, folder))
    flags = flags.resolved()
    architecture = pretrained.load_config(folder)
    if flags.data.max_length > architecture.max_positions:
        raise InputError(
            f"max_length {flags.data.max_length:,} is beyond the model's range of "
            f"{architecture.max_positions:,} tokens; lower --max-length"
        )
    if flags.sink + flags.recent >= flags.data.max_length:
        raise InputError(
            f"a streaming head of {flags.sink:,} + {flags.recent:,} tokens sees all of a sample of "
            f"{flags.data.max_length:,}, like a retrieval head; lower --recent or --sink, or raise "
            "--max-length"
        )
    start = training.warm_start(flags, architecture)
    tokenizer = pretrained.load_tokenizer(folder)
    documents = load_documents(flags.text)
    training_text, held_out_text = split_held_out(documents)
    chat = _chat_form(folder) if flags.chats else None
    sampler = PasskeySampler(
        flags.data,
        tokenizer,
        training_text,
        seed=flags.seed,
        chat=chat,
        fewest=flags.min_passkeys,
    )
    if sampler.largest_token >= architecture.vocab_size:
        raise InputError(
            f"the tokenizer makes token {sampler.largest_token:,}, the model has "
            f"{architecture.vocab_size:,}; do they belong together?"
        )
    settings = dataclasses.asdict(flags) | {
        "text_digest": text_digest(documents),
        "init_digest": None if start is None else checksums.of_bytes(start.tobytes()),
    }
    check_workdir(flags.folder(), settings, operational=(*_OPERATIONAL, _WEIGHTS))
    mesh = _devices(flags, architecture)
    if len(jax.devices()) > 1:
        print(f"[on {devices.described(mesh)}]", file=sys.stderr)
    with devices.within(mesh):
        params = pretrained.load_params(folder, dtype=jnp.dtype(flags.dtype), mesh=mesh)
        settings[_WEIGHTS] = digest_of(params)
        check_workdir(flags.folder(), settings, operational=_OPERATIONAL)
        report_file = flags.folder() / "report.md"
        if files.exists(report_file):
            print(files.read_text(report_file))
            print(f"This run was complete already; all of it is in {flags.folder()}")
            return
        test, itself = None, None
        if flags.eval_samples:
            test = RetrievalTest(
                flags.data,
                tokenizer,
                training_text,
                held_out_text,
                num_samples=flags.eval_samples,
                seed=flags.seed,
                implementation=flags.implementation,
            )
        with contextlib.closing(
            WorkDir(flags.folder(), settings, operational=_OPERATIONAL)
        ) as workdir:
            if test is not None:
                itself = test.scores(
                    architecture,
                    params,
                    np.ones((architecture.num_layers, architecture.num_kv_heads), bool),
                    sink_size=flags.sink,
                    recent_size=flags.recent,
                )
                if words := report.warning(itself, dataclasses.asdict(flags.data)):
                    print(f"warning: {words}", file=sys.stderr)
            gates, step_seconds = find_heads(flags, architecture, params, sampler, workdir)
            metrics = workdir.metrics()
        pattern = _pattern(flags, gates)
        save_pattern(pattern, workdir.path / "pattern")
        title = _name_of(flags.model)
        pictures = {"title": title}
        if flags.method in _VALUES:
            pictures["value"] = f"{_VALUES[flags.method]} (1: retrieval head)"
        if flags.method not in _UNTRAINED:
            place = workdir.path / "history.png"
            plots.save_history(metrics, place, title=title, turns=training.turns(flags))
        plots.save_gates(pattern, workdir.path / "gates.png", **pictures)
        targets = () if flags.target_sparsity is None else (flags.target_sparsity,)
        results = report.make(
            name=title,
            config=dataclasses.asdict(flags),
            architecture=architecture,
            params=params,
            pattern=pattern,
            test=test,
            itself=itself,
            sparsities=sorted({*flags.eval_sparsities, *targets}),
            random_seeds=flags.eval_random_seeds,
        )
        results["seconds"] = {
            "per_sample" if flags.method in _UNTRAINED else "per_training_step": step_seconds,
            "whole_command": round(time.monotonic() - started, 1),
        }
        if results["retrieval"]:
            plots.save_retrieval(results["retrieval"], workdir.path / "retrieval.png", title=title)
        report.save(results, workdir.path)
        print(files.read_text(report_file))
        print(f"Pattern, pictures and report are in {workdir.path}")


def find_heads(
    flags: IdentifyConfig,
    architecture: ModelConfig,
    params: llama.Params,
    sampler: PasskeySampler,
    workdir: WorkDir,
) -> tuple[Float[np.ndarray, "layers kv_heads"], float | None]:
    """Return the method's gates or scores, and the seconds of a step (None: all was done already).

    Raises:
      InputError: the samples or the loss cannot be used.
    """
    scores = {"profile": profile.profile, "reconstruct": reconstruct.reconstruct}
    find = scores.get(flags.method, training.train)
    return find(flags, architecture, params, sampler, workdir)


def _name_of(model: str) -> str:
    """Return a model's hub name, or the name of its file or folder, not where that lies."""
    return pathlib.PurePath(model).name if files.exists(pathlib.Path(model)) else model


def _devices(flags: IdentifyConfig, architecture: ModelConfig) -> Mesh | None:
    """Return the devices that share the model; None: one has all of it.

    Raises:
      InputError: so many cannot.
    """
    if flags.devices is not None:
        return devices.mesh_of(architecture, flags.devices, by_heads=True)

    def needed() -> int:
        dtype = jnp.dtype(flags.dtype)
        init = functools.partial(llama.init_params, architecture, dtype=dtype)
        params = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
        weights = sum(leaf.size * dtype.itemsize for leaf in params)
        # Of every layer: its input, and the teacher's attention if the student uses it.
        streams = architecture.num_layers * flags.data.max_length * architecture.embed_size
        return weights + streams * dtype.itemsize * (2 if flags.mixing == "teacher" else 1)

    return devices.automatic(architecture, needed, by_heads=True)


def _chat_form(folder: pathlib.Path) -> tuple[str, str]:
    """Return what a model's chat template writes before and after a user's message.

    Raises:
      InputError: the model has none, or it does not write the message as it is.
    """
    tokenization = load_tokenization(folder)
    if not tokenization.tokenizer.chat_template:
        raise InputError("this model has no chat template; leave out --chats")
    rendered = tokenization.render_chat([{"role": "user", "content": _MESSAGE}])
    before, found, after = rendered.partition(_MESSAGE)
    if not found:
        raise InputError("the model's chat template changes messages; leave out --chats")
    return before, after


def _pattern(flags: IdentifyConfig, gates: Float[np.ndarray, "layers kv_heads"]) -> Pattern:
    settings = {name: getattr(flags, field) for name, field in _KEPT.items() if flags.reads(field)}
    return Pattern(
        gates=np.asarray(gates, np.float64),
        sink_size=flags.sink,
        recent_size=flags.recent,
        extra={
            "model_name": _name_of(flags.model),
            "method": flags.method,
            **settings,
            "context_length_min": flags.data.min_length,
            "context_length_max": flags.data.max_length,
            "num_passkeys": flags.data.num_passkeys,
            "seed": flags.seed,
            "made_by": "duo_jax",
        },
    )

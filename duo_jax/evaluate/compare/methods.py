"""Every method at a budget of bytes: the largest setting that fits, and the answers it gives.

The bytes are those of the live buffers of keys and values, with room for all questions and answers.
So methods that append while decoding and methods that keep evicting have the same peak, and at the
whole budget every method is the full cache.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from duo_jax.cache import cache_bytes
from duo_jax.data import tokenizer_calls
from duo_jax.evaluate import compression, eviction
from duo_jax.evaluate.compare import served
from duo_jax.evaluate.compare.tasks import Task
from duo_jax.evaluate.compression import Shape
from duo_jax.evaluate.results.forced import score
from duo_jax.heads.pattern import choose_retrieval_heads
from duo_jax.heads.reconstruction import Instruction
from duo_jax.heads.split import duo_config, reorder_layer
from duo_jax.mesh import weights
from duo_jax.session.runtime import Runtime

Method = Literal[
    "full",
    "duo",
    "profile heads",
    "random heads",
    "all-streaming",
    "H2O",
    "TOVA",
    "SnapKV",
    "FastGen",
    "HeadKV",
    "KVzip",
    "ThinK",
    "ShadowKV",
    "CHAI",
]
FULL: Method = "full"
SINKS = 4  # of StreamingLLM (2309.17453, section 3.2)

Row = dict[str, Any]
TokenRows = Sequence[Int[np.ndarray, "_"]]  # token rows of any lengths
Answer = Callable[[TokenRows, TokenRows], eviction.Predicted]  # from texts and tails


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """The model that is compared, and what the methods know of it."""

    runtime: Runtime  # with full caches, heads in their own order
    gates: Float[np.ndarray, "layers kv_heads"]
    profile: Float[np.ndarray, "layers kv_heads"]  # duo_jax.heads.attention_profile
    sink: int
    recent: int
    special: tuple[int, ...]
    punctuation: tuple[int, ...]
    instruction: Instruction  # to repeat a text
    clustering_losses: Float[np.ndarray, "_ _"]  # of layers with 1, 2, ... clusters; for CHAI only


def predict_with_full_caches(
    subject: Subject, task: Task, *, batch: int
) -> list[eviction.Predicted]:
    """Return what full caches predict, batch by batch."""
    setting = _setting(subject, task, FULL, 1.0, seed=0)
    assert not isinstance(setting, str)
    return [setting[0](texts, tails) for texts, tails, _ in batches(task, batch)]


def measure(
    subject: Subject,
    task: Task,
    method: Method,
    budget: float,
    *,
    full: Sequence[eviction.Predicted],
    batch: int,
    seed: int = 0,
) -> Row:
    """Measure one method at one budget on one task.

    Args:
      subject: the model.
      task: texts and questions.
      method: the method.
      budget: fraction of the bytes of full caches.
      full: `predict_with_full_caches`, for the same batches.
      batch: texts that are read at a time.
      seed: random seed of random heads.

    Returns:
      Scores of each text, bytes and setting; only a "reason" where not even the smallest setting
      fits.
    """
    full_bytes = _full_bytes(subject, task)
    setting = _setting(subject, task, method, budget, seed=seed)
    if isinstance(setting, str):
        return {"reason": setting, "full_bytes": full_bytes}
    answer, described = setting
    cache_bytes, text_bytes, host_bytes = 0, [], 0  # the second of methods that evict

    def answers() -> Iterator[eviction.Predicted]:
        nonlocal cache_bytes, host_bytes
        for reference, (texts, tails, _) in zip(full, batches(task, batch), strict=True):
            found = reference if method == FULL else answer(texts, tails)
            cache_bytes = max(cache_bytes, found.cache_bytes)
            host_bytes = max(host_bytes, found.host_bytes)
            if found.text_bytes is not None:
                text_bytes.append(found.text_bytes)
            yield found

    row = score_answers(subject.runtime, task, answers(), full=full, batch=batch)
    if method == FULL:
        row["kl"] = None
    row |= {
        "cache_bytes": cache_bytes,
        "text_bytes": float(np.mean(text_bytes)) if text_bytes else None,
        "full_bytes": full_bytes,
        "setting": described,
    }
    return row | ({"host_bytes": host_bytes} if host_bytes else {})


def score_answers(
    runtime: Runtime,
    task: Task,
    answers: Iterable[eviction.Predicted],
    *,
    full: Sequence[eviction.Predicted],
    batch: int,
) -> Row:
    """Score the answers to a task's questions, and compare them with those of full caches.

    Args:
      runtime: the model.
      task: texts and questions.
      answers: of each batch; one batch at a time is looked at.
      full: `predict_with_full_caches`, for the same batches.
      batch: texts that are read at a time.

    Returns:
      exact, tokens, nll and kl, with a number for each text.
    """
    predicted, nll, kl = [], [], []
    both = zip(answers, full, batches(task, batch), strict=True)
    for found, reference, (_, tails, count) in both:
        scores = score(runtime, found.forced, tails, reference=reference.forced)
        predicted.extend(scores.predicted[:count])
        nll.extend(scores.nll[:count])
        kl.extend([] if scores.kl is None else scores.kl[:count])
    right = task.score(predicted)
    return {
        "exact": right.exact.tolist(),
        "tokens": right.tokens.tolist(),
        "nll": task.mean(nll).tolist(),
        "kl": task.mean(kl).tolist() if kl else None,
    }


def punctuation_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that are punctuation marks only, apart from white space around them."""
    words = ((i, tokenizer_calls.decode(tokenizer, [i]).strip()) for i in range(len(tokenizer)))
    return tuple(i for i, word in words if word and set(word) <= set(string.punctuation))


def _setting(
    subject: Subject, task: Task, method: Method, budget: float, *, seed: int
) -> tuple[Answer, Row] | str:
    """Return how to answer, and the setting in words; or why nothing fits."""
    if method in _POLICIES:
        return _evicting(subject, task, method, budget)
    if method in _COMPRESSIONS:
        return _compressing(subject, task, method, budget)
    heads_of = {
        FULL: np.ones(subject.gates.shape),
        "duo": subject.gates,
        "profile heads": subject.profile,
        "random heads": np.random.default_rng([seed, 1]).random(subject.gates.shape),
        "all-streaming": np.zeros(subject.gates.shape),
    }
    sizes, number = (subject.sink, subject.recent), _most_retrieval_heads(subject, task, budget)
    if method == FULL:
        number = subject.gates.size
    if method == "all-streaming":
        slots = int(budget * (task.length + task.room))
        if slots <= SINKS:
            return f"{SINKS} sinks and a token take more"
        sizes, number = (SINKS, slots - SINKS), 0
    if number is None:
        return f"streaming heads of {sum(sizes)} tokens take more"
    chosen = choose_retrieval_heads(heads_of[method], sparsity=1 - number / subject.gates.size)
    split = split_runtime(subject.runtime, chosen, sizes)

    def answer(texts: TokenRows, tails: TokenRows) -> eviction.Predicted:
        return served.predict(split, texts, tails, length=task.length, room=task.room)

    described = {
        "retrieval_heads": split.config.retrieval_counts,
        "sink": sizes[0],
        "recent": sizes[1],
    }
    return answer, described


# The methods that evict tokens, for one model.
_POLICIES: dict[str, Callable[[Subject], eviction.Policy]] = {
    "H2O": lambda _: eviction.H2O(),
    "TOVA": lambda _: eviction.TOVA(),
    "SnapKV": lambda _: eviction.SnapKV(),
    "FastGen": lambda subject: eviction.FastGen(
        special=subject.special, punctuation=subject.punctuation
    ),
    "HeadKV": lambda subject: eviction.HeadKV(
        importance=tuple(map(tuple, subject.profile.tolist()))
    ),
    "KVzip": lambda subject: eviction.KVzip(instruction=subject.instruction),
}


def _evicting(
    subject: Subject, task: Task, method: Method, budget: float
) -> tuple[Answer, Row] | str:
    """Return what `_setting` returns, for a method that evicts tokens."""
    policy = _POLICIES[method](subject)
    heads = subject.gates.size
    slots = int(budget * (task.length + task.room)) * heads
    # A policy that keeps what is written keeps at least a token of the text as well.
    if policy.keeps_written and slots < (task.room + 1) * heads:
        return f"what is asked and answered takes more ({task.room} tokens)"
    if slots < 2 * heads:
        return "two tokens take more"

    def answer(texts: TokenRows, tails: TokenRows) -> eviction.Predicted:
        return eviction.predict(
            subject.runtime,
            policy,
            texts,
            tails,
            slots=slots,
            length=task.length,
            room=task.room,
        )

    hidden = (
        "importance",
        "special",
        "punctuation",
        "instruction",
    )  # long, and known from the model
    described = {k: v for k, v in dataclasses.asdict(policy).items() if k not in hidden}
    return answer, described | {"tokens_per_head": slots // heads}


# The methods that keep a text in another form: their largest setting within a budget.
_COMPRESSIONS: dict[str, Callable[[Subject, Shape, float], compression.Compression | str]] = {
    "ThinK": lambda _, shape, budget: compression.ThinK.fitting(shape, budget),
    "ShadowKV": lambda _, shape, budget: compression.ShadowKV.fitting(shape, budget),
    "CHAI": lambda subject, shape, budget: compression.CHAI.fitting(
        shape, budget, subject.clustering_losses
    ),
}


def _compressing(
    subject: Subject, task: Task, method: Method, budget: float
) -> tuple[Answer, Row] | str:
    """Return what `_setting` returns, for a method that keeps a text in another form."""
    sizes = {"length": task.length, "room": task.room}
    layers, kv_heads = subject.gates.shape
    head_dim = subject.runtime.config.architecture.head_dim
    shape = Shape(layers=layers, kv_heads=kv_heads, head_dim=head_dim, **sizes)
    setting = _COMPRESSIONS[method](subject, shape, budget)
    if isinstance(setting, str):
        return setting
    answer = functools.partial(compression.predict, subject.runtime, setting, **sizes)
    return answer, dataclasses.asdict(setting)


def split_runtime(
    full: Runtime, heads: Bool[np.ndarray, "layers kv_heads"], sizes: tuple[int, int]
) -> Runtime:
    """Return the model with these retrieval heads; weights that keep their order are shared."""
    architecture = full.config.architecture
    layers = tuple(
        reorder_layer(architecture, layer, row)
        for layer, row in zip(full.params["layers"], heads, strict=True)
    )
    params = {**full.params, "layers": layers}
    if full.mesh is not None:  # each device gets its part of what has another order now
        params = jax.device_put(params, weights.shardings(full.mesh, params))
    return dataclasses.replace(
        full,
        config=duo_config(architecture, heads, sink_size=sizes[0], recent_size=sizes[1]),
        params=params,
    )


def _bytes(subject: Subject, task: Task, retrieval: int) -> int:
    """Return the bytes of a cache with so many retrieval heads."""
    heads = np.arange(subject.gates.size).reshape(subject.gates.shape) < retrieval
    config = duo_config(
        subject.runtime.config.architecture,
        heads,
        sink_size=subject.sink,
        recent_size=subject.recent,
    )
    max_len = task.length + task.room
    return cache_bytes(config, batch_size=1, max_len=max_len, dtype=subject.runtime.dtype)


def _full_bytes(subject: Subject, task: Task) -> int:
    return _bytes(subject, task, subject.gates.size)


def _most_retrieval_heads(subject: Subject, task: Task, budget: float) -> int | None:
    """Return the most retrieval heads that fit; None where even streaming heads alone do not."""
    most = budget * _full_bytes(subject, task)
    fitting = [n for n in range(subject.gates.size + 1) if _bytes(subject, task, n) <= most]
    return max(fitting, default=None)


def batches(task: Task, size: int) -> Iterator[tuple[list, list, int]]:
    """Yield texts and tails, the last batch filled up: one shape, one compilation."""
    for first in range(0, len(task.texts), size):
        texts, tails = task.texts[first : first + size], task.tails[first : first + size]
        more = size - len(texts)
        yield texts + texts[-1:] * more, tails + tails[-1:] * more, len(texts)

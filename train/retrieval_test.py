"""Passkey retrieval under a pattern, on samples that training never saw.

A passkey counts when each of its tokens is the model's most likely next token after the true ones
before it, which is the case exactly when greedy decoding would write the whole passkey. Masks make
every KV head a retrieval or a streaming head; a split cache gives the same numbers.

The same forward pass tells, for models too weak to write whole passkeys, how likely the true tokens
are, how many are the most likely ones, and how far the distributions are from those with full
attention.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from duo_jax.data.passkeys import PasskeyConfig, Sample, sampler_of_first
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from duo_jax.model.token_scores import check_finite, score_streams
from kernels import Implementation
from train import gates
from train.distillation import Batch, predicted_positions, tail_of, tail_positions

_TOKENS_PER_BATCH = 4096


class RetrievalTest:
    """A fixed set of samples of the longest length.

    Passkeys are hidden in held-out text, or in training text where the held-out part is too short
    (`haystack` says which). The passkeys are new in either case.

    Args:
      data: passkeys, templates and length.
      tokenizer: the model's, as transformers loads it.
      training_text: documents that identification reads.
      held_out_text: documents that it does not read.
      num_samples: how many samples.
      seed: decides every sample, together with its index.
      stream: another number gives other samples; training has stream 0.
      implementation: of attention, see kernels.dispatch.
    """

    def __init__(
        self,
        data: PasskeyConfig,
        tokenizer: Any,
        training_text: list[str],
        held_out_text: list[str],
        *,
        num_samples: int,
        seed: int,
        stream: int = 1,
        implementation: Implementation = "auto",
    ) -> None:
        self._implementation = implementation
        texts = {
            "held-out text": held_out_text,
            "training text (the held-out part is shorter than the length)": training_text,
        }
        sampler, self.haystack = sampler_of_first(texts, data, tokenizer, seed=seed, stream=stream)
        self.samples = [sampler.sample(i, length=data.max_length) for i in range(num_samples)]
        self.length = max(s.tokens.size for s in self.samples)
        self._tail_size = max(s.tokens.size - s.tail_start for s in self.samples)
        self._rows = max(1, min(num_samples, _TOKENS_PER_BATCH // self.length))

    def accuracy(
        self,
        architecture: ModelConfig,
        params: llama.Params,
        heads: Bool[np.ndarray, "layers kv_heads"],
        *,
        sink_size: int,
        recent_size: int,
    ) -> Float[np.ndarray, "samples passkeys"]:
        """Return 1 where a passkey was retrieved exactly, with `heads` as the retrieval heads."""
        return self.scores(
            architecture, params, heads, sink_size=sink_size, recent_size=recent_size
        ).exact

    def scores(
        self,
        architecture: ModelConfig,
        params: llama.Params,
        heads: Bool[np.ndarray, "layers kv_heads"],
        *,
        sink_size: int,
        recent_size: int,
        reference: "RetrievalScores | None" = None,
    ) -> "RetrievalScores":
        """Return what the model makes of the passkeys, with `heads` as the retrieval heads.

        Args:
          architecture: the model.
          params: its parameters.
          heads: which heads attend to everything; the others stream.
          sink_size: sinks of streaming heads.
          recent_size: recent tokens of streaming heads.
          reference: scores of the model itself, to measure the divergence from.

        Raises:
          InputError: the model's numbers are not finite.
        """
        tokens, nll, kl = [], [], []  # of each sample, a number per passkey
        kept = []
        for number, first in enumerate(range(0, len(self.samples), self._rows)):
            rows = self.samples[first : first + self._rows]
            batch = self._batch(rows)
            tails = _tails(
                params,
                jnp.asarray(heads),
                batch,
                architecture=architecture,
                sink_size=sink_size,
                recent_size=recent_size,
                tail_size=self._tail_size,
                implementation=self._implementation,
            )
            kept.append(np.asarray(tails))
            places = tail_positions(batch, self._tail_size)
            predicted = predicted_positions(batch, self._tail_size)
            scores = score_streams(
                architecture,
                params,
                tails,
                jnp.take_along_axis(batch.tokens, predicted, axis=1),
                None if reference is None else jnp.asarray(reference.tails[number]),
            )
            scores = jax.tree.map(np.asarray, scores)
            starts = np.asarray(places)[:, 0]
            for i, (sample, start) in enumerate(zip(rows, starts, strict=False)):
                spans = [slice(a - 1 - start, b - 1 - start) for a, b in sample.answers]
                true = [sample.tokens[a:b] for a, b in sample.answers]
                pairs = zip(spans, true, strict=True)
                tokens.append([np.mean(scores.predicted[i, at] == key) for at, key in pairs])
                nll.append([scores.nll[i, at].mean() for at in spans])
                if scores.kl is not None:
                    kl.append([scores.kl[i, at].mean() for at in spans])
        right, nll = np.array(tokens, np.float64), np.array(nll, np.float64)
        check_finite(nll)
        return RetrievalScores(
            exact=(right == 1).astype(np.float64),
            tokens=right,
            nll=nll,
            kl=np.array(kl, np.float64) if kl else None,
            tails=kept,
        )

    def _batch(self, rows: list[Sample]) -> Batch:
        rows = rows + rows[:1] * (self._rows - len(rows))
        tokens = [np.pad(s.tokens, (0, self.length - s.tokens.size)) for s in rows]
        return Batch(
            tokens=jnp.asarray(np.stack(tokens)),
            tail_start=jnp.array([s.tail_start for s in rows]),
            total_length=jnp.array([s.tokens.size for s in rows]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalScores:
    """Scores of every passkey; those of its tokens are means over them."""

    exact: Float[np.ndarray, "samples passkeys"]  # 1 where every token is the most likely one
    tokens: Float[np.ndarray, "samples passkeys"]  # fraction of tokens that are
    nll: Float[np.ndarray, "samples passkeys"]  # nats
    kl: Float[np.ndarray, "samples passkeys"] | None  # KL(reference || model), nats
    tails: list[Float[np.ndarray, "batch tail embed"]]  # residual streams, for use as a reference


@functools.partial(
    jax.jit,
    static_argnames=("architecture", "sink_size", "recent_size", "tail_size", "implementation"),
)
def _tails(
    params: llama.Params,
    heads: Bool[Array, "layers kv_heads"],
    batch: Batch,
    *,
    architecture: ModelConfig,
    sink_size: int,
    recent_size: int,
    tail_size: int,
    implementation: Implementation,
) -> Float[Array, "batch tail embed"]:
    """Return the residual streams at the questions and answers."""
    attend = gates.chosen_attention(
        sink_size=sink_size, recent_size=recent_size, implementation=implementation
    )
    x, _ = llama.hidden_states(
        architecture,
        params,
        batch.tokens,
        attend=attend,
        layer_inputs=heads,
        total_length=jnp.max(batch.total_length),
    )
    return tail_of(x, batch, tail_size)

"""Exact passkey retrieval under a pattern, on samples that training never saw.

A passkey counts when each of its tokens is the model's most likely next token after the true ones
before it, which is the case exactly when greedy decoding would write the whole passkey. Masks make
every KV head a retrieval or a streaming head; a split cache gives the same numbers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from duo_jax.data.passkeys import PasskeyConfig, Sample, sampler_of_first
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import Implementation
from train import gates as gated
from train.distillation import Batch, tail_of, tail_positions

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
        implementation: Implementation = "auto",
    ) -> None:
        self._implementation = implementation
        texts = {
            "held-out text": held_out_text,
            "training text (the held-out part is shorter than the length)": training_text,
        }
        sampler, self.haystack = sampler_of_first(texts, data, tokenizer, seed=seed, stream=1)
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
        gates = jnp.asarray(heads, jnp.float32)
        right = []
        for first in range(0, len(self.samples), self._rows):
            rows = self.samples[first : first + self._rows]
            batch = self._batch(rows)
            predicted = np.asarray(
                _predict_tail(
                    params,
                    gates,
                    batch,
                    architecture=architecture,
                    sink_size=sink_size,
                    recent_size=recent_size,
                    tail_size=self._tail_size,
                    implementation=self._implementation,
                )
            )
            starts = np.asarray(tail_positions(batch, self._tail_size))[:, 0]
            for sample, start, row in zip(rows, starts, predicted, strict=False):
                right.append(
                    [
                        np.array_equal(row[a - 1 - start : b - 1 - start], sample.tokens[a:b])
                        for a, b in sample.answers
                    ]
                )
        return np.array(right, np.float64)

    def _batch(self, rows: list[Sample]) -> Batch:
        rows = rows + rows[:1] * (self._rows - len(rows))
        tokens = [np.pad(s.tokens, (0, self.length - s.tokens.size)) for s in rows]
        return Batch(
            tokens=jnp.asarray(np.stack(tokens)),
            tail_start=jnp.array([s.tail_start for s in rows]),
            total_length=jnp.array([s.tokens.size for s in rows]),
        )


@functools.partial(
    jax.jit,
    static_argnames=("architecture", "sink_size", "recent_size", "tail_size", "implementation"),
)
def _predict_tail(
    params: llama.Params,
    gates: Float[Array, "layers kv_heads"],
    batch: Batch,
    *,
    architecture: ModelConfig,
    sink_size: int,
    recent_size: int,
    tail_size: int,
    implementation: Implementation,
) -> Int[Array, "batch tail"]:
    attend = gated.self_mixed_attention(
        sink_size=sink_size, recent_size=recent_size, implementation=implementation
    )
    x, _ = llama.hidden_states(
        architecture,
        params,
        batch.tokens,
        attend=attend,
        layer_inputs=gates,
        total_length=jnp.max(batch.total_length),
    )
    return jnp.argmax(llama.logits(architecture, params, tail_of(x, batch, tail_size)), axis=-1)

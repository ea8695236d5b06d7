"""KVzip: what the model looks at while it repeats the text.

Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv
2505.23416, sections 3.2 and 3.4; public code https://github.com/snu-mllab/KVzip. After the prompt
is read, the model repeats it (duo_jax.heads.reconstruction); each key's score is the largest
attention that it is paid. The highest scores of all layers and heads stay (the public code's level
"pair"), so that heads keep different numbers of tokens. This happens once; decoding appends.

GQA: as in the public code, the largest attention of any query head of a group.

The public code keeps the system prompt and never asks for it; here all of the prompt competes, the
first tokens too, which nearly every head looks at.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.evaluate.eviction.policy import Budget, Selection, Step, highest
from duo_jax.heads.reconstruction import Instruction, key_scores
from duo_jax.session.runtime import Runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip:
    """The policy of KVzip; the module's docstring describes it."""

    name: ClassVar[str] = "KVzip"
    keeps_written: ClassVar[bool] = True
    window: int | None = 1  # what the prompt's own queries look at plays no part
    instruction: Instruction

    def reread(
        self, runtime: Runtime, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch layers kv_heads length"]:
        """Return the scores of all keys."""
        scores = key_scores(
            runtime.config.architecture,
            runtime.params,
            np.asarray(tokens),
            np.asarray(lengths),
            instruction=self.instruction,
            implementation=runtime.implementation,  # pyright: ignore[reportArgumentType]
        )
        return jnp.asarray(scores.swapaxes(0, 1))

    def select(self, prompt: Prompt, budget: Budget) -> Selection:
        """Keep the highest scores of all heads."""
        shape = prompt.received.shape
        scores = jnp.where(prompt.exists, prompt.received, -jnp.inf).reshape(shape[0], -1)
        number = budget.slots - budget.room * shape[1] * shape[2]
        kept = highest(scores, number).reshape(shape)
        return Selection(kept=kept, sizes=jnp.sum(kept, axis=-1, dtype=jnp.int32) + budget.room)

    def longest(self, prompt: Prompt, budget: Budget) -> int:
        """Return the length of the text, with room: a head may keep all of it."""
        return min(budget.slots, prompt.tokens.shape[1] + budget.room)

    def keep(self, step: Step, state: Any) -> Bool[Array, "batch kv_heads held"]:
        """Keep everything."""
        del state
        return step.held.exists

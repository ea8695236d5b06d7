"""HeadKV: SnapKV with a budget of its own for every head.

Fu et al., "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval
and Reasoning", arXiv 2410.19258, section 3.2. With an average budget b per head beyond the
observation window, every head gets b - b/beta, and the pool of all b/beta is shared out in
proportion to the heads' importance. Inside a head tokens are chosen as by SnapKV. Window 32 and
max-pooling over 7 are the public code's; the paper tries beta from 1.005 to 10 and reports the best
for each model; here it is 1.01, nearly all in the pool.

Importance: the paper estimates it from needle tests, as the attention that a head pays to the
answer. Here it is the attention profile (duo_jax.heads.attention_profile), the same scores by which
the method "profile heads" chooses, so that both use equal knowledge of the model. A share beyond
the prompt's length goes to the other heads.

GQA: as SnapKV; importance is of KV heads.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.evaluate.eviction.policy import Budget, Selection, highest
from duo_jax.evaluate.eviction.snapkv import SnapKV, window_votes


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadKV(SnapKV):
    """The policy of HeadKV; the module's docstring describes it."""

    name: ClassVar[str] = "HeadKV"
    keeps_written: ClassVar[bool] = True
    importance: tuple[tuple[float, ...], ...]  # per layer and KV head, at least 0
    beta: float = 1.01

    def select(self, prompt: Prompt, budget: Budget) -> Selection:
        """Keep in each head the window and the votes that its budget has room for."""
        sizes = jnp.broadcast_to(
            jnp.asarray(self.budgets(prompt, budget))[None], prompt.keys.shape[:3]
        )
        scores = window_votes(prompt, window=self.window, kernel=self.kernel, count=sizes)
        return Selection(kept=highest(scores, sizes), sizes=sizes + budget.room)

    def longest(self, prompt: Prompt, budget: Budget) -> int:
        """Return the largest budget, with room."""
        return int(self.budgets(prompt, budget).max()) + budget.room

    def budgets(self, prompt: Prompt, budget: Budget) -> Int[np.ndarray, "layers kv_heads"]:
        """Return how much of the prompt every head keeps; all of it at most."""
        length = prompt.tokens.shape[1]
        importance = np.array(self.importance, np.float64)
        slots = budget.slots - budget.room * importance.size
        window = min(self.window, slots // importance.size)
        free = slots - window * importance.size
        total = importance.sum()
        shares = importance / total if total else np.full(importance.shape, 1 / importance.size)
        wanted = (1 - 1 / self.beta) * free / importance.size + shares * free / self.beta
        return (window + _share_out(wanted, total=free, most=length - window)).astype(np.int32)


def _share_out(
    wanted: Float[np.ndarray, "layers kv_heads"], *, total: int, most: int
) -> Int[np.ndarray, "layers kv_heads"]:
    """Round down to whole slots, at most `most`; the rest goes to the other heads, evenly."""
    shares = np.minimum(np.floor(wanted + 1e-6), most).astype(np.int64)
    while (left := total - shares.sum()) > 0 and (shares < most).any():
        room = (shares < most).nonzero()
        count = min(left, room[0].size)
        first = tuple(index[:count] for index in room)
        step = max(1, left // room[0].size)
        shares[first] = np.minimum(shares[first] + step, most)
    return shares

"""Dense attention in float64 numpy, straight from the definitions: what every case must return."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels import masks

STALE = 1e4  # content of slots that no query sees: any finite number will do, in float16 too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the keys that queries meet."""

    keys: Float[np.ndarray, "batch kv_heads slots head_dim"]
    values: Float[np.ndarray, "batch kv_heads slots head_dim"]
    mask: Bool[np.ndarray, "batch q_len slots"]  # which query sees which slot

    def stale(self, keys: float = STALE, values: float = -STALE) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values with stale numbers in the slots that no query sees."""
        seen = np.any(self.mask, axis=1)[:, None, :, None]
        dtype = self.keys.dtype.type
        return np.where(seen, self.keys, dtype(keys)), np.where(seen, self.values, dtype(values))


def causal_mask(
    starts: Int[np.ndarray, " batch"], length: int, kv_positions: Int[np.ndarray, " slots"]
) -> Bool[np.ndarray, "batch {length} slots"]:
    """Return which of `length` queries of each row see which positions."""
    return np.stack(
        [masks.causal(start + np.arange(length), kv_positions) for start in starts.tolist()]
    )


def streaming_mask(
    starts: Int[np.ndarray, " batch"],
    length: int,
    kv_positions: Int[np.ndarray, "#batch slots"],
    *,
    sink_size: int,
    recent_size: int,
) -> Bool[np.ndarray, "batch {length} slots"]:
    """Return which of `length` queries of each row see which positions."""
    kv_positions = np.broadcast_to(kv_positions, (len(starts), kv_positions.shape[1]))
    return np.stack(
        [
            masks.streaming(
                start + np.arange(length),
                positions,
                sink_size=sink_size,
                recent_size=recent_size,
            )
            for start, positions in zip(starts.tolist(), kv_positions, strict=True)
        ]
    )


def softmax(
    scores: Float[np.ndarray, "*rows keys"],
) -> tuple[Float[np.ndarray, "*rows keys"], Float[np.ndarray, "*rows"]]:
    """Return weights and lse over the last axis; 0 and -inf where all scores are -inf."""
    scores = scores.astype(np.float64)
    highest = scores.max(axis=-1)
    highest = np.where(np.isneginf(highest), 0, highest)
    weights = np.exp(scores - highest[..., None])
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = highest + np.log(total)
    return weights / np.where(total == 0, 1, total)[..., None], lse


def attend(
    q: Float[np.ndarray, "batch q_len q_heads head_dim"],
    parts: Sequence[Part],
    *,
    softmax_scale: float,
    rounded_to: DTypeLike | None = None,
) -> tuple[
    Float[np.ndarray, "batch q_len q_heads head_dim"], Float[np.ndarray, "batch q_len q_heads"]
]:
    """Return output and lse of attention over all parts.

    Args:
      q: queries.
      parts: keys and values.
      softmax_scale: factor on the scores.
      rounded_to: dtype that keys, values, weights and output are rounded to, as in a program of
        that dtype. Scores are exact.
    """
    weights, lse, _, v = _weights(q, parts, softmax_scale, rounded_to)
    weights = _rounded(weights, rounded_to)
    out = np.moveaxis(weights @ v, 1, 2)
    return out if rounded_to is None else out.astype(rounded_to), np.moveaxis(lse, 1, 2)


def gradients(
    q: Float[np.ndarray, "batch q_len q_heads head_dim"],
    part: Part,
    d_out: Float[np.ndarray, "batch q_len q_heads head_dim"],
    *,
    softmax_scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of q, and of k and v [batch, slots, kv_heads, head_dim]."""
    weights, _, k, v = _weights(q, [part], softmax_scale)
    q, d_out = (np.moveaxis(x.astype(np.float64), 2, 1) for x in (q, d_out))
    d_weights = d_out @ np.swapaxes(v, 2, 3)
    delta = (d_weights * weights).sum(axis=-1, keepdims=True)
    d_scores = weights * (d_weights - delta) * softmax_scale

    def of_kv_heads(x: np.ndarray) -> np.ndarray:
        """Sum [batch, q_heads, slots, head_dim] over the query heads of each KV head."""
        batch, _, slots, head_dim = x.shape
        x = x.reshape(batch, part.keys.shape[1], -1, slots, head_dim).sum(axis=2)
        return np.moveaxis(x, 1, 2)

    d_q = np.moveaxis(d_scores @ k, 1, 2)
    d_k = of_kv_heads(np.swapaxes(d_scores, 2, 3) @ q)
    return d_q, d_k, of_kv_heads(np.swapaxes(weights, 2, 3) @ d_out)


def _weights(
    q: np.ndarray,
    parts: Sequence[Part],
    softmax_scale: float,
    rounded_to: DTypeLike | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return weights [b, n, t, s], lse [b, n, t], and every query head's k and v [b, n, s, h]."""
    group = q.shape[2] // parts[0].keys.shape[1]
    k, v = (
        _rounded(np.concatenate(x, axis=2), rounded_to).repeat(group, axis=1)
        for x in ([part.keys for part in parts], [part.values for part in parts])
    )
    mask = np.concatenate([part.mask for part in parts], axis=2)
    scores = softmax_scale * np.moveaxis(q.astype(np.float64), 2, 1) @ np.swapaxes(k, 2, 3)
    weights, lse = softmax(np.where(mask[:, None], scores, -np.inf))
    return weights, lse, k, v


def _rounded(x: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
    """Return x in float64, rounded to another dtype before."""
    return (x if dtype is None else x.astype(dtype)).astype(np.float64)

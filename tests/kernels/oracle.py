"""What a named case must give: dense attention in float64 numpy, straight from the definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels.case import Case
from kernels.decode.cases import DecodeCase
from kernels.full.cases import FullCase
from kernels.merge.cases import MergeCase
from kernels.packed import Packed, unpack
from kernels.packed.cases import PackedDecodeCase, PackedPrefillCase
from kernels.prefill.cases import PrefillCase

STALE = 1e4  # what a slot nobody sees may hold: anything finite, in float16 too
STALE_SCALE = 100.0  # times 255 it must be finite in float16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the keys a query meets."""

    keys: np.ndarray  # [batch, kv_heads, slots, head_dim]
    values: np.ndarray  # as keys
    mask: np.ndarray  # [batch, q_len, slots]: which query sees which slot

    def stale(self) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values with stale numbers in the slots that no query sees."""
        seen = self.mask.any(axis=1)[:, None, :, None]
        keys = np.where(seen, self.keys, self.keys.dtype.type(STALE))
        return keys, np.where(seen, self.values, self.values.dtype.type(-STALE))


def draw(case: Case, seed: int = 0):
    """Return random arguments of a case, with stale numbers in the slots that nobody sees."""
    arguments = case.draw(seed)
    if isinstance(case, PackedDecodeCase | PackedPrefillCase):
        return _stale_scales(case, arguments)
    arguments = jax.tree.map(np.asarray, arguments)
    if isinstance(case, FullCase | MergeCase):
        pass  # every slot is seen
    elif isinstance(case, DecodeCase | PrefillCase):
        q, *_, integers = arguments
        arguments = q, *_parts(case, arguments)[0].stale(), integers
    elif case.lengths:
        *chunk, past = arguments
        sinks, recents, _ = _parts(case, arguments)
        leaves = [*sinks.stale(), *recents.stale(), past.lengths]
        arguments = *chunk, jax.tree.unflatten(jax.tree.structure(past), leaves)
    return jax.tree.map(jnp.asarray, arguments)


def cast(arguments, dtype):
    """Return the arguments with all floating-point numbers in another dtype."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments
    )


def expected(case: Case, arguments):
    """Return what a case returns: (out, lse), (out,) or the gradients of q, k and v."""
    arguments = jax.tree.map(_unpacked, arguments, is_leaf=lambda x: isinstance(x, Packed))
    if isinstance(case, MergeCase):
        outs, lses = arguments
        weights, lse = softmax(np.moveaxis(np.asarray(case.seen(lses)), 0, -1))
        return np.einsum("...p,p...h->...h", weights, outs.astype(np.float64)), lse
    parts = _parts(case, arguments)
    q = arguments[0].astype(np.float64)
    if isinstance(case, DecodeCase):
        out, lse = _attend(q[:, None], parts, case.softmax_scale)
        return out[:, 0], lse[:, 0]
    if getattr(case, "gradient", False):
        return _gradients(q, parts[0], arguments[3].astype(np.float64), case.softmax_scale)
    out, lse = _attend(q, parts, case.softmax_scale)
    return (out,) if isinstance(case, FullCase) else (out, lse)


def _stale_scales(case: Case, arguments):
    """Return packed arguments with stale scales where no query sees any number of theirs."""
    q, *packed, integers = arguments
    seen = _parts(case, (q, *packed, np.asarray(integers)))[0].mask.any(axis=1)  # [batch, slots]
    stale = []
    for x in packed:
        of_scales = seen.reshape(len(seen), x.scales.shape[2], -1).any(axis=2)[:, None, :, None]
        scales, zeros = (
            jnp.where(of_scales, y, jnp.float16(STALE_SCALE)) for y in (x.scales, x.zeros)
        )
        stale.append(dataclasses.replace(x, scales=scales, zeros=zeros))
    return q, *stale, integers


def _unpacked(x):
    return np.asarray(unpack(x) if isinstance(x, Packed) else x)


def _parts(case: Case, arguments) -> list[Part]:
    if isinstance(case, DecodeCase):
        _, k, v, lengths = arguments
        mask = np.arange(case.slots)[None, None] < lengths[:, None, None]
        return [Part(keys=k, values=v, mask=mask)]
    if isinstance(case, PrefillCase):
        _, k, v, offsets = arguments
        positions = offsets[:, None] + np.arange(case.length)
        mask = np.arange(case.slots)[None, None] <= positions[:, :, None]
        return [Part(keys=k, values=v, mask=mask)]
    _, k, v, *rest = arguments
    k, v = np.moveaxis(k, 2, 1), np.moveaxis(v, 2, 1)
    if isinstance(case, FullCase):
        mask = np.tril(np.ones((case.length, case.length), bool))
        return [Part(keys=k, values=v, mask=np.broadcast_to(mask, (case.batch, *mask.shape)))]
    starts = np.zeros((k.shape[0], 1), int)
    if not case.lengths:
        return [Part(keys=k, values=v, mask=_streaming(case, starts, starts + _range(case)))]
    past = rest[0]
    starts = past.lengths[:, None].astype(int)
    sinks = _streaming(case, starts, np.arange(case.sink)[None])
    # Sinks are among the cached sinks, never counted again elsewhere.
    at = starts + np.arange(-case.recent, 0)
    recents = _streaming(case, starts, at) & (at >= case.sink)[:, None]
    at = starts + _range(case)
    chunk = _streaming(case, starts, at) & (at >= case.sink)[:, None]
    return [
        Part(keys=past.sink_keys, values=past.sink_values, mask=sinks),
        Part(keys=past.recent_keys, values=past.recent_values, mask=recents),
        Part(keys=k, values=v, mask=chunk),
    ]


def _range(case) -> np.ndarray:
    return np.arange(case.length)[None]


def _streaming(case, starts, kv_positions) -> np.ndarray:
    """Return which queries see which positions: [batch, q_len, positions]."""
    i, j = (starts + _range(case))[:, :, None], kv_positions[:, None, :]
    return (j <= i) & ((j < case.sink) | (i - j < case.recent))


def softmax(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and lse over the last axis in float64; 0 and -inf where all is -inf."""
    scores = scores.astype(np.float64)
    highest = scores.max(axis=-1)
    highest = np.where(np.isneginf(highest), 0, highest)
    weights = np.exp(scores - highest[..., None])
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = highest + np.log(total)
    return weights / np.where(total == 0, 1, total)[..., None], lse


def _weights(q, parts: list[Part], scale: float):
    """Return weights [b, n, t, s], lse [b, n, t], and every query head's k and v [b, n, s, h]."""
    group = q.shape[2] // parts[0].keys.shape[1]
    k = np.concatenate([x.keys.astype(np.float64) for x in parts], axis=2).repeat(group, axis=1)
    v = np.concatenate([x.values.astype(np.float64) for x in parts], axis=2).repeat(group, axis=1)
    mask = np.concatenate([x.mask for x in parts], axis=2)
    scores = scale * np.moveaxis(q, 2, 1) @ np.swapaxes(k, 2, 3)
    weights, lse = softmax(np.where(mask[:, None], scores, -np.inf))
    return weights, lse, k, v


def _attend(q, parts: list[Part], scale: float):
    weights, lse, _, v = _weights(q, parts, scale)
    return np.moveaxis(weights @ v, 1, 2), np.moveaxis(lse, 1, 2)


def _gradients(q, part: Part, d_out, scale: float):
    weights, _, k, v = _weights(q, [part], scale)
    q, d_out = np.moveaxis(q, 2, 1), np.moveaxis(d_out, 2, 1)
    d_weights = d_out @ np.swapaxes(v, 2, 3)
    delta = (d_weights * weights).sum(axis=-1, keepdims=True)
    d_scores = weights * (d_weights - delta) * scale

    def of_kv_heads(x):  # [b, n, s, h], summed over the query heads of each KV head
        batch, _, length, head_dim = x.shape
        x = x.reshape(batch, part.keys.shape[1], -1, length, head_dim).sum(axis=2)
        return np.moveaxis(x, 1, 2)

    d_q = np.moveaxis(d_scores @ k, 1, 2)
    d_k = of_kv_heads(np.swapaxes(d_scores, 2, 3) @ q)
    return d_q, d_k, of_kv_heads(np.swapaxes(weights, 2, 3) @ d_out)

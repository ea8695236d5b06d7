"""Votes for the tokens of full caches, and the eviction of those with few."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.cache import LATEST, KVCache, LayerCache, evict, init_cache, update
from duo_jax.heads.split import duo_config
from duo_jax.model.hf_config import parse_config
from duo_jax.serve import attention
from duo_jax.serve.votes import count_votes
from kernels import prefill_attention
from tests import models

BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, SLOTS = 2, 4, 2, 16, 160
CONFIG = duo_config(
    parse_config(
        models.llama(
            num_attention_heads=Q_HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            num_hidden_layers=1,
        )
    ),
    np.ones((1, KV_HEADS), bool),
    sink_size=4,
    recent_size=8,
)


def numbers(length, heads, seed):
    drawn = np.random.default_rng(seed).standard_normal((BATCH, length, heads, HEAD_DIM))
    return jnp.asarray(drawn, jnp.float32)


def read(chunks, voters, kv="model"):
    """Read chunks of (padded length, tokens per row); return the cache and all that was read."""
    cache = init_cache(CONFIG, batch_size=BATCH, max_len=SLOTS, kv=kv, votes=True)
    part, kept = cache.layers[0].full[0], cache.kept
    read = [([], []) for _ in range(BATCH)]
    for seed, (length, num_tokens) in enumerate(chunks):
        q = numbers(length, Q_HEADS, 3 * seed)
        k, v = (numbers(length, KV_HEADS, 3 * seed + i) for i in (1, 2))
        if kv == "bf16":
            q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        num_tokens = jnp.array(num_tokens, jnp.int32)
        part = update.append(part, k, v, starts=kept, num_tokens=num_tokens)
        _, lse = prefill_attention(q, part.keys, part.values, kept, softmax_scale=HEAD_DIM**-0.5)
        place = {"kept": kept, "num_tokens": num_tokens}
        part = jax.jit(count_votes, static_argnames="voters")(part, q, lse, voters=voters, **place)
        kept = kept + num_tokens
        for row in range(BATCH):
            read[row][0].extend(np.asarray(q[row, : num_tokens[row]], np.float64))
            read[row][1].extend(np.asarray(k[row, : num_tokens[row]], np.float64))
    layer = LayerCache(full=(part,), streaming=None)
    return dataclasses.replace(cache, layers=(layer,), lengths=kept, kept=jnp.copy(kept)), read


def weights_of(queries, keys):
    """Return attention weights in float64, [q_heads, length, length]."""
    q, k = (np.moveaxis(np.array(x), 1, 0) for x in (queries, keys))
    k = np.repeat(k, Q_HEADS // KV_HEADS, axis=0)
    scores = np.einsum("htd,hsd->hts", q, k) * HEAD_DIM**-0.5
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("voters", "kv"),
    [
        ("latest", "model"),
        ("all", "int4"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("latest", "int8"), ("latest", "int4"), ("all", "model"), ("all", "int8"))
        ),
    ],
)
def test_votes_are_attention_weights(voters, kv):
    cache, read_rows = read([(100, (100, 70)), (50, (50, 40))], voters, kv)
    part = cache.layers[0].full[0]
    for row, (queries, keys) in enumerate(read_rows):
        if kv != "model":
            keys = np.moveaxis(np.asarray(update.unpacked(part, jnp.float32)[0][row]), 0, 1)
            keys = keys[: len(queries)].astype(np.float64)
        weights = weights_of(queries, keys)
        grouped = weights.reshape(KV_HEADS, -1, *weights.shape[1:])
        latest = grouped.mean(1)[:, -LATEST:].sum(1)
        expected = latest if voters == "latest" else grouped.max((1, 2))
        found = part.votes[row, :, : len(queries), 0]
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert not part.votes[row, :, len(queries) :].any()


@pytest.mark.slow
def test_a_short_end_leaves_earlier_votes_their_part():
    before, _ = read([(100, (100, 70))], "latest")
    after, rows = read([(100, (100, 70)), (4, (4, 0))], "latest")
    old, new = (cache.layers[0].full[0].votes[..., 0] for cache in (before, after))
    np.testing.assert_array_equal(new[1], old[1])  # nothing was read
    latest = weights_of(*rows[0]).reshape(KV_HEADS, -1, 104, 104).mean(1)[:, -4:].sum(1)
    expected = latest + (1 - 4 / LATEST) * np.pad(old[0, :, :100], ((0, 0), (0, 4)))
    np.testing.assert_allclose(new[0, :, :104], expected, atol=2e-6)


def chosen(votes, held, keep):
    """Return the slots that stay, by the definition."""
    slot = np.arange(held)
    near = [votes[max(0, s - 3) : min(held, s + 4)].max() for s in slot]
    votes = np.where(slot >= held - LATEST, np.inf, near)
    return np.sort(np.argsort(-votes, kind="stable")[:keep])


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "kv", ["model", "int4", *(pytest.param(kv, marks=pytest.mark.slow) for kv in ("bf16", "int8"))]
)
def test_what_stays_is_what_was_looked_at_most(kv):
    cache, _ = read([(100, (100, 70))], "latest", kv)
    old = jax.tree.map(np.asarray, cache.layers[0].full[0])
    keep = (60, 50)
    after = evict(cache, keep, slots=64)
    part = after.layers[0].full[0]
    assert part.slots == 64
    np.testing.assert_array_equal(after.lengths, [100, 70])
    np.testing.assert_array_equal(after.kept, keep)
    for row, count in enumerate(keep):
        for head in range(KV_HEADS):
            stays = chosen(old.votes[row, head, :, 0], (100, 70)[row], count)
            assert stays[-LATEST:].tolist() == list(range((100, 70)[row]))[-LATEST:]
            for new, leaf in zip(jax.tree.leaves(part), jax.tree.leaves(old), strict=True):
                np.testing.assert_array_equal(new[row, head, :count], leaf[row, head, stays])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("length", [1, 5])
def test_later_tokens_see_what_stayed_and_each_other(length):
    cache, _ = read([(100, (100, 70))], "latest")
    cache = evict(cache, (60, 50), slots=72)
    part = jax.tree.map(np.asarray, cache.layers[0].full[0])
    q = numbers(length, Q_HEADS, 9)
    k, v = (numbers(length, KV_HEADS, seed) for seed in (10, 11))
    layer_input = attention.LayerInput(
        cache=cache.layers[0],
        lengths=cache.lengths,
        kept=cache.kept,
        num_tokens=jnp.array([length, length], jnp.int32),
    )
    options = {"mode": "exact", "implementation": "xla"}
    out, layer = attention.attend(q, k, v, layer_input, config=CONFIG, **options)
    for row, kept in enumerate((60, 50)):
        keys, values = (
            np.concatenate([old[row, :, :kept], np.moveaxis(np.asarray(new[row]), 1, 0)], axis=1)
            for old, new in ((part.keys, k), (part.values, v))
        )
        np.testing.assert_array_equal(layer.full[0].keys[row, :, : kept + length], keys)
        padded = np.pad(np.asarray(q[row], np.float64), ((kept, 0), (0, 0), (0, 0)))
        weights = weights_of(padded, np.moveaxis(keys.astype(np.float64), 1, 0))[:, kept:]
        expected = np.einsum("hts,hsd->thd", weights, np.repeat(values, 2, axis=0))
        np.testing.assert_allclose(out[row], expected, atol=2e-6)


def test_rings_stay_as_they_are():
    ring = KVCache(keys=jnp.ones((1, 1, 12, 16)), values=jnp.ones((1, 1, 12, 16)))
    cache = init_cache(CONFIG, batch_size=1, max_len=100, votes=True)
    layer = dataclasses.replace(cache.layers[0], streaming=ring)
    lengths = jnp.array([90], jnp.int32)
    cache = dataclasses.replace(cache, layers=(layer,), lengths=lengths, kept=jnp.copy(lengths))
    assert evict(cache, [40], slots=48).layers[0].streaming is ring

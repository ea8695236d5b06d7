"""Baselines that keep a text in another form: the defining property of each, and its bytes."""

import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.evaluate import compression
from duo_jax.evaluate.compression import CHAI, ShadowKV, Shape, ThinK, chai
from duo_jax.evaluate.results.forced import score
from duo_jax.heads.split import duo_config, split_params
from duo_jax.session.runtime import Runtime
from tests.duo_jax.evaluate import test_eviction
from tests.duo_jax.evaluate.test_eviction import LENGTH, ROOM, assert_same, expected

stacked, rows = test_eviction.stacked, test_eviction.rows
SHAPE = Shape(layers=2, kv_heads=2, head_dim=8, length=LENGTH, room=ROOM)


def changed(stacked, change):
    """Return the model with other projections of the layers: config, stacked params, runtime."""
    config, params = stacked
    layers = params["layers"]
    attention = {name: dict(leaves) for name, leaves in layers["self_attn"].items()}
    for name in ("q_proj", "k_proj"):
        attention[name]["kernel"] = change(name, attention[name]["kernel"])
    params = {**params, "layers": {**layers, "self_attn": attention}}
    heads = np.ones((config.num_layers, config.num_kv_heads), bool)
    served = split_params(config, params, heads)
    return config, params, Runtime(config=duo_config(config, heads), params=served)


def predict(runtime, method, rows):
    found = compression.predict(runtime, method, *rows, length=LENGTH, room=ROOM)
    return score(runtime, found.forced, rows[1]).predicted, found


def bytes_of(numbers: float) -> float:
    return numbers * SHAPE.layers * SHAPE.kv_heads * 4


def test_think_keeps_the_channels_with_the_largest_norm_of_queries_times_keys():
    rng = np.random.default_rng(0)
    queries, keys = rng.standard_normal((5, 8)), rng.standard_normal((20, 8))
    keys[:, 3] *= 0.01
    norms = [np.linalg.norm(np.outer(queries[:, c], keys[:, c])) for c in range(8)]
    method = ThinK(pruned=3, tokens=20)
    kept = method.channels(jnp.asarray(np.square(queries).sum(axis=0)), jnp.asarray(keys))
    np.testing.assert_array_equal(kept, np.sort(np.argsort(norms)[3:]))
    assert 3 not in kept


def test_think_notes_the_last_queries_of_every_row():
    q = np.random.default_rng(0).standard_normal((2, 40, 4, 8)).astype(np.float32)
    found = ThinK(pruned=0, tokens=1).note(
        jnp.asarray(q), jnp.zeros((2, 40, 2, 8)), jnp.array([40, 20])
    )
    for row, (first, stop) in enumerate([(8, 40), (0, 20)]):
        squares = np.square(q[row, first:stop]).reshape(stop - first, 2, 2, 8).sum(axis=(0, 2))
        np.testing.assert_allclose(found[row], squares, rtol=1e-5)


@pytest.mark.slow
def test_think_loses_nothing_where_the_pruned_channels_of_the_keys_are_zero(stacked, rows):
    """Rotation mixes channels 1 and 5, 2 and 6; the last 32 tokens keep all of theirs."""
    zero = jnp.zeros(8).at[jnp.array([1, 2, 5, 6])].set(1.0)

    def change(name, kernel):
        return kernel * (1 - zero)[None, None, None] if name == "k_proj" else kernel

    *model, runtime = changed(stacked, change)
    method = ThinK(pruned=4, tokens=LENGTH, window=4)
    tokens, found = predict(runtime, method, rows)
    assert_same(tokens, expected(model, rows))
    assert found.cache_bytes == bytes_of((LENGTH + ROOM) * 16 - (LENGTH - 4) * 4)


@pytest.mark.parametrize("budget", [0.45, 0.7, 0.9, 1.0])
def test_think_prunes_channels_before_tokens_and_stays_within_the_budget(budget):
    shape = Shape(layers=3, kv_heads=2, head_dim=16, length=300, room=40)
    method = ThinK.fitting(shape, budget)
    assert (method.pruned, method.tokens) == {
        0.45: (6, 131),
        0.7: (6, 236),
        0.9: (5, 300),
        1.0: (0, 300),
    }[budget]
    assert "takes more" in ThinK.fitting(shape, 0.1)


@pytest.mark.slow
def test_shadowkv_of_full_rank_that_fetches_everything_is_full_attention(stacked, rows):
    *model, runtime = changed(stacked, lambda _, kernel: kernel)
    method = ShadowKV(rank=16, outliers=1, fetched=4, local=1)
    tokens, found = predict(runtime, method, rows)
    assert_same(tokens, expected(model, rows))
    assert found.cache_bytes == bytes_of(method.numbers(SHAPE))
    assert found.host_bytes == bytes_of(LENGTH * 8)  # the values
    assert method.whole(LENGTH) == 23  # of 37: the others come from the low rank and the host


def test_shadowkv_fetches_the_chunks_whose_landmarks_the_group_looks_at_most():
    landmarks = np.zeros((1, 1, 4, 8), np.float32)
    landmarks[0, 0, :, 0], landmarks[0, 0, :, 1] = (1, 5, 2, 9), (1, 0, 3, 9)
    q = np.zeros((1, 1, 2, 8), np.float32)
    q[0, 0, 0, 0] = q[0, 0, 1, 1] = 10.0  # the group's heads look at chunks 2 and 5
    method = ShadowKV(rank=1, outliers=1, fetched=2)
    chunk_of = jnp.array([[[0, 2, 5, -1]]])  # the last one is of another row
    chosen, exists = method._choose(jnp.asarray(q), jnp.asarray(landmarks), chunk_of)
    assert (sorted(chosen[0, 0].tolist()), exists[0, 0].tolist()) == ([2, 5], [True, True])
    few = ShadowKV(rank=1, outliers=1, fetched=6)
    chosen, exists = few._choose(jnp.asarray(q), jnp.asarray(landmarks), chunk_of)
    assert sorted(chosen[0, 0][exists[0, 0]].tolist()) == [0, 2, 5]


def test_shadowkv_has_the_papers_sizes_for_the_papers_shape():
    shape = Shape(layers=32, kv_heads=8, head_dim=128, length=131_072, room=0)
    method = ShadowKV.fitting(shape, 0.175)
    assert (method.rank, method.outliers) == (160, 48)
    assert 2_048 <= method.fetched * 8 <= 8_192
    assert method.numbers(shape) <= shape.numbers(0.175)
    assert "take more" in ShadowKV.fitting(shape, 0.1)


@pytest.mark.slow
def test_chai_with_heads_that_look_alike_loses_nothing(stacked, rows):
    """Both KV heads have the same queries and keys; their values differ."""

    def change(_, kernel):
        half = kernel.shape[2] // 2
        return jnp.concatenate([kernel[:, :, :half]] * 2, axis=2)

    *model, runtime = changed(stacked, change)
    tokens, found = predict(runtime, CHAI(clusters=(1, 1)), rows)
    assert_same(tokens, expected(model, rows))
    assert found.cache_bytes == bytes_of((LENGTH + ROOM) * 12)  # half of the keys


def test_chai_clusters_what_is_alike_and_as_many_clusters_as_heads_are_all_heads():
    rng = np.random.default_rng(0)
    alike, other, third = rng.random((3, 25))
    features = np.stack([other, alike, third, alike * 2, alike])
    assert chai.cluster(features, 3).tolist() == [0, 1, 2, 1, 1]
    assert chai.cluster(features, 5).tolist() == [0, 1, 2, 3, 4]
    assert chai.cluster(features, 1).tolist() == [0] * 5
    (curve,) = chai.losses(features[None, None])
    assert curve[0] > curve[1] > curve[2] > -1e-9
    np.testing.assert_allclose(curve[2:], 0, atol=1e-9)


def test_chai_merges_where_it_costs_least_and_stays_within_the_budget():
    losses = np.array([[9.0, 5.0, 0.1, 0.0], [3.0, 2.0, 1.0, 0.0]])
    assert chai.share_out(losses, 8) == (4, 4)
    assert chai.share_out(losses, 6) == (3, 3)
    assert chai.share_out(losses, 4) == (3, 1)
    assert chai.share_out(losses, 2) == (1, 1)
    shape = Shape(layers=2, kv_heads=4, head_dim=8, length=100, room=10)
    assert CHAI.fitting(shape, 0.75, losses) == CHAI(clusters=(3, 1))
    assert CHAI.fitting(shape, 1.0, losses) == CHAI(clusters=(4, 4))
    assert "take more" in CHAI.fitting(shape, 0.6, losses)

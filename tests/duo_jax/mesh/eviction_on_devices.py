"""Tokens that several devices evict are those of one; test_on_devices runs this on eight."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import duo_jax
from duo_jax import serve
from duo_jax.cache import evict, init_cache, stripes
from duo_jax.mesh import weights
from duo_jax.mesh.devices import make_mesh
from duo_jax.serve.votes import Voters
from tests import models
from tests.duo_jax.mesh.serving_on_devices import ONE, RAW, split

PREFILL = jax.jit(
    serve.prefill, static_argnames=("config", "voters", "implementation"), donate_argnames="cache"
)
KEPT = [300, 530]  # of which eight devices hold more than a stripe each


@functools.cache
def load(number: int, **options) -> duo_jax.DuoModel:
    return duo_jax.load("demo", devices=number, **options)


@pytest.mark.slow
@pytest.mark.parametrize("voters", ["latest", "all"])
def test_the_tokens_that_stay_are_those_of_one_device(voters: Voters):
    duo, params = split(ONE, "model", "float32")
    tokens, found = jnp.asarray(models.tokens(RAW, batch=2, length=600)), []
    for mesh in (None, make_mesh(jax.devices())):
        placed = params if mesh is None else jax.device_put(params, weights.shardings(mesh, params))
        cache = init_cache(duo, batch_size=2, max_len=600, votes=True, mesh=mesh)
        counts = jnp.array([580, 600], jnp.int32)
        _, cache = PREFILL(duo, placed, cache, tokens, counts, voters=voters, implementation="xla")
        votes = stripes.to_host(cache.layers[0].full[0].votes, 580, mesh)
        cache = evict(cache, KEPT, slots=531)  # no whole stripes
        assert cache.kept.tolist() == KEPT
        [part] = cache.layers[0].full
        keys, values = (stripes.to_host(x, max(KEPT), mesh) for x in (part.keys, part.values))
        if mesh is not None:
            assert {x.data.shape for x in part.keys.addressable_shards} == {(2, 3, 128, 8)}
        found.append(
            (votes, *(x[row, :, :n] for row, n in enumerate(KEPT) for x in (keys, values)))
        )
    for one, eight in itertools.zip_longest(*found):
        np.testing.assert_allclose(eight, one, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "keep_by", "kv"),
    [(8, "snapkv", "model"), (8, "kvzip", "model"), (2, "kvzip", "int8")],
)
def test_tokens_are_evicted_as_on_one_device(tmp_path, number, keep_by, kv):
    text = "The third passkey to the vault is charlie lima. " * 9
    texts, sizes = [], []
    for devices in (1, number):
        book = load(devices, keep=0.5, keep_by=keep_by, kv=kv).conversation()
        book.append(text)
        texts.append([book.generate(" What is it?", max_new_tokens=8)])
        cache = book.session.cache
        slots = stripes.whole(cache.layers[0].full[0].slots, number)
        sizes.append((np.asarray(cache.kept).tolist(), slots))
        book.save(tmp_path / str(devices))
        texts[-1].append(book.generate(" And the first?", max_new_tokens=8))
    assert texts[0] == texts[1]
    assert sizes[0] == sizes[1]
    again = load(number, keep=0.5, keep_by=keep_by, kv=kv).load_conversation(tmp_path / "1")
    assert again.generate(" And the first?", max_new_tokens=8) == texts[0][1]

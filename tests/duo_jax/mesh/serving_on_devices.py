"""Serving on a mesh equals serving on one device; test_on_devices runs this on eight."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import serve
from duo_jax.cache import cache_shapes, grow, init_cache, stripes
from duo_jax.cache.pages import rings_of
from duo_jax.heads.split import DuoConfig, duo_config, split_params
from duo_jax.mesh import devices, weights
from duo_jax.mesh.devices import make_mesh
from duo_jax.model.config import ModelConfig
from duo_jax.model.hf_config import parse_config
from duo_jax.model.quantised_weights import quantise_params
from tests import models
from tests.params import random_params

SINK, RECENT, SLOTS = 3, 5, 704
RAW = models.llama(
    num_key_value_heads=8,
    num_attention_heads=16,
    head_dim=8,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
)
CONFIG, ONE, SMALL, EVERY = (parse_config(RAW | {"num_hidden_layers": n}) for n in (4, 1, 2, 9))
# Retrieval heads of the layers.
COUNTS = {ONE: (3,), SMALL: (3, 0), CONFIG: (0, 1, 3, 8), EVERY: range(9)}
# Tokens of each row, of chunks that are padded to a width: ragged, a row that waits, and a width
# that no number of devices divides. Other models have that width only, and compile one program.
# Together more than a stripe of each device; decoding ends the second row's last stripe.
CHUNKS = [(304, (304, 211)), (301, (301, 0)), (304, (71, 300))]
OF_ONE_WIDTH = [(301, counts) for counts in ((301, 211), (300, 0), (75, 300))]
ACTIVE = [(True, True), (True, False), (True, True)]
TOLERANCE = {"float32": 1e-5, "float64": 1e-7, "bf16": 0.05}
PROGRAMS = {
    "prefill": jax.jit(
        serve.prefill, static_argnames=("config", "mode", "implementation"), donate_argnames="cache"
    ),
    "decode": jax.jit(
        serve.decode, static_argnames=("config", "implementation"), donate_argnames="cache"
    ),
}


def heads_of(config: ModelConfig) -> np.ndarray:
    """Return the retrieval heads of every layer, not in order."""
    rng = np.random.default_rng(1)
    return np.array([rng.permutation(np.arange(8) < count) for count in COUNTS[config]])


@functools.cache
def split(config: ModelConfig, weight_format: str, dtype: str):
    heads = heads_of(config)
    params = split_params(config, random_params(config, dtype=np.dtype(dtype)), heads)
    duo = duo_config(config, heads, sink_size=SINK, recent_size=RECENT)
    return duo, quantise_params(params, weight_format)


def logits_of(number, *, config=CONFIG, groups=1, mode, implementation, kv, weight_format, dtype):
    """Read CHUNKS and decode some tokens; logits where they are defined. None: no mesh."""
    duo, params = split(config, weight_format, dtype)
    mesh = None
    if number is not None:
        mesh = make_mesh(jax.devices()[:number], data=groups)
        params = jax.device_put(params, weights.shardings(mesh, params))
    sizes = {"batch_size": 2, "max_len": SLOTS, "dtype": np.dtype(dtype), "kv": kv, "mesh": mesh}
    cache, rng, found = init_cache(duo, **sizes), np.random.default_rng(0), []

    def draw(*shape):
        return jnp.asarray(rng.integers(0, config.vocab_size, shape), jnp.int32)

    chunks = CHUNKS if config is CONFIG else OF_ONE_WIDTH
    for width, counts in chunks:
        num = jnp.array(counts, jnp.int32)
        options = {"mode": mode, "implementation": implementation}
        logits, cache = PROGRAMS["prefill"](duo, params, cache, draw(2, width), num, **options)
        found.append(np.asarray(logits)[np.array(counts) > 0])
    for active in ACTIVE:
        logits, cache = PROGRAMS["decode"](
            duo, params, cache, draw(2), jnp.array(active), implementation=implementation
        )
        found.append(np.asarray(logits)[np.array(active)])
    read = np.sum([counts for _, counts in chunks] + list(ACTIVE), axis=0)
    assert np.asarray(cache.lengths).tolist() == read.tolist()
    return np.concatenate(found)


@functools.cache
def expected(number, **case):
    """Return the logits by XLA: kernels are compared with that everywhere."""
    return logits_of(number, **case | {"implementation": "xla"})


def check(number, groups=1, against=None, **case):
    """Compare with one device, or with a mesh of as many as `against` says."""
    with jax.enable_x64(case["dtype"] == "float64"):
        np.testing.assert_allclose(
            logits_of(number, groups=groups, **case),
            expected(against, **case),
            atol=TOLERANCE["bf16" if case["kv"] == "bf16" else case["dtype"]],
        )


PLAIN = {"mode": "exact", "implementation": "xla", "kv": "model", "weight_format": "model"}
PLAIN |= {"dtype": "float32"}


def test_ragged_chunks_and_decoding_equal_one_device():
    check(8, config=SMALL, **PLAIN)


def test_packed_blocks_are_seen_as_on_one_device():
    check(8, config=ONE, **PLAIN | {"kv": "int2"})


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 8])
def test_chunks_of_two_widths_in_more_layers_equal_one_device(number):
    check(number, **PLAIN)


@pytest.mark.slow
def test_groups_of_devices_share_the_rows():
    check(4, groups=2, config=SMALL, **PLAIN)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mode": "chunk"}, marks=pytest.mark.slow),
        pytest.param({"implementation": "interpret"}, marks=pytest.mark.slow),
        pytest.param(
            {"kv": "int4", "weight_format": "int8", "dtype": "float64"}, marks=pytest.mark.slow
        ),
        # In float32, which is what kernels take, keys of one device and of eight differ in their
        # last bits, and so do one or two codes. XLA on eight is compared with one in float64.
        pytest.param(
            {"kv": "int8", "implementation": "interpret", "against": 8}, marks=pytest.mark.slow
        ),
        pytest.param({"kv": "int2", "dtype": "float64"}, marks=pytest.mark.slow),
        pytest.param(
            {"kv": "int2", "implementation": "interpret", "against": 8}, marks=pytest.mark.slow
        ),
    ],
    ids=[
        "prefill by chunks",
        "our kernels",
        "packed",
        "packed, our kernels",
        "packed in blocks",
        "packed in blocks, our kernels",
    ],
)
def test_other_settings_equal_one_device(changes):
    check(8, **{"config": SMALL} | PLAIN | changes)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["exact", "chunk"])
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_every_number_of_retrieval_heads_equals_one_device(number, mode, implementation):
    check(number, config=EVERY, **PLAIN | {"mode": mode, "implementation": implementation})


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 8])
@pytest.mark.parametrize("mode", ["exact", "chunk"])
@pytest.mark.parametrize("kv", ["bf16", "int8", "int4", "int2"])
def test_packed_caches_equal_one_device(number, mode, kv):
    check(number, config=EVERY, **PLAIN | {"mode": mode, "kv": kv, "dtype": "float64"})


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 8])
@pytest.mark.parametrize("weight_format", ["int8", "w8a8", "int4"])
def test_quantised_weights_equal_one_device(number, weight_format):
    check(number, **PLAIN | {"weight_format": weight_format, "dtype": "float64"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("q_heads", "kv_heads"),
    [(4, 2), (8, 4)],
    ids=["none", "queries only"],
)
def test_heads_that_cannot_be_shared_are_on_every_device(q_heads, kv_heads):
    raw = RAW | {"num_attention_heads": q_heads, "num_key_value_heads": kv_heads}
    config = parse_config(raw | {"num_hidden_layers": 1})
    heads = np.arange(kv_heads)[None] < 1
    duo = duo_config(config, heads, sink_size=SINK, recent_size=RECENT)
    params = split_params(config, random_params(config), heads)
    found = []
    for mesh in (None, make_mesh(jax.devices())):
        placed = params if mesh is None else jax.device_put(params, weights.shardings(mesh, params))
        cache = init_cache(duo, batch_size=1, max_len=20, mesh=mesh)
        tokens, num = jnp.arange(13, dtype=jnp.int32)[None], jnp.array([13], jnp.int32)
        one, cache = PROGRAMS["prefill"](duo, placed, cache, tokens, num)
        two, cache = PROGRAMS["decode"](duo, placed, cache, tokens[:, 0])
        found.append(np.concatenate([one, two]))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_weights_lie_in_parts_that_add_up():
    _, params = split(CONFIG, "int8", "float32")
    mesh = make_mesh(jax.devices())
    placed = jax.device_put(params, weights.shardings(mesh, params))
    whole = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), part in zip(whole, jax.tree.leaves(placed), strict=True):
        name = jax.tree_util.keystr(path)
        assert {x.data.size for x in part.addressable_shards} == {
            part.addressable_shards[0].data.size
        }
        cut = part.addressable_shards[0].data.size * 8 == leaf.size
        small = "norm" in name or ("scales" in name and ("o_proj" in name or "down" in name))
        assert cut != small, name


# Retrieval heads of every layer in the six published patterns, at 50% sparsity.
PUBLISHED = {
    "Llama-2-7B-32K": "12 21 4 10 4 11 14 13 14 13 18 17 18 19 23 20 21 20 21 19 19 15 20 9 17 "
    "14 20 9 12 15 22 28",
    "Llama-3-8B-1048k": "1 1 3 2 2 4 2 4 6 4 5 3 2 6 5 5 5 6 3 5 6 3 3 6 4 4 3 4 6 5 8 2",
    "Llama-3-8B-4194k": "2 1 3 0 2 5 2 4 5 3 4 4 1 6 5 5 5 6 3 3 6 4 5 5 5 5 5 6 5 5 8 0",
    "Llama-3.1-8B": "2 3 4 1 4 2 2 6 4 6 5 5 2 8 4 5 4 6 3 4 5 2 4 5 3 3 3 4 5 5 8 1",
    "Mistral-v0.2": "3 4 6 2 4 1 3 3 2 5 2 5 6 1 4 4 5 2 7 5 6 4 3 3 4 4 5 3 4 7 6 5",
    "Mistral-v0.3": "2 3 5 2 3 4 3 4 1 2 3 5 5 1 5 5 4 2 7 5 5 6 3 4 4 3 6 3 4 7 6 6",
}


def published(name: str) -> DuoConfig:
    counts = tuple(map(int, PUBLISHED[name].split()))
    kv_heads = 32 if "Llama-2" in name else 8
    raw = models.llama(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=kv_heads)
    architecture = parse_config(raw | {"head_dim": 128, "hidden_size": 4096})
    return DuoConfig(architecture=architecture, retrieval_counts=counts)


@pytest.mark.parametrize(("length", "kv"), [(1, "int4"), (1_000_003, "model"), (1_000_003, "int2")])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_device_holds_the_same_bytes(name, length, kv):
    config, mesh = published(name), make_mesh(jax.devices())
    sizes = {"batch_size": 1, "max_len": length, "kv": kv, "dtype": jnp.bfloat16}
    shapes, one = cache_shapes(config, mesh=mesh, **sizes), cache_shapes(config, **sizes)
    stripe = cache_shapes(config, **sizes | {"max_len": 64})
    places = stripes.shardings(mesh, shapes)
    for layer, where, whole, least in zip(
        shapes.layers, places.layers, one.layers, stripe.layers, strict=True
    ):
        # A device has its eighth, and at most one stripe more for each head.
        mine = bytes_of(shared(layer), shared(where))
        assert 0 <= mine - bytes_of(shared(whole)) / 8 < max(1, bytes_of(shared(least)))
        assert bytes_of(rings_of((layer,)), rings_of((where,))) == bytes_of(rings_of((whole,)))


def shared(layer) -> list:
    """Return what devices share of a layer's caches."""
    return [(part.keys, part.values) for part in layer.full]


def bytes_of(shapes, places=None) -> int:
    """Bytes of a tree of shapes; with their shardings, those that a device has of them."""
    leaves = jax.tree.leaves(shapes)
    held = [x.shape for x in leaves]
    if places is not None:
        where = jax.tree.leaves(places)
        held = [at.shard_shape(x.shape) for at, x in zip(where, leaves, strict=True)]
    return sum(math.prod(s) * x.dtype.itemsize for s, x in zip(held, leaves, strict=True))


@pytest.mark.parametrize("num", [1, 2, 3, 8])
def test_positions_are_shared_to_within_one_stripe(num):
    lengths = jnp.arange(1200)
    shares = [stripes.Share(device=device, num=num) for device in range(num)]
    held = np.stack([share.held(lengths) for share in shares])
    owner = np.arange(1200)[None] // 64 % num == np.arange(num)[:, None]
    before = np.concatenate([np.zeros((num, 1), int), np.cumsum(owner, axis=1)[:, :-1]], axis=1)
    np.testing.assert_array_equal(held, before)
    assert np.ptp(held, axis=0).max() <= 64
    for share, own in zip(shares, owner, strict=True):
        np.testing.assert_array_equal(share.positions(np.arange(own.sum())), np.flatnonzero(own))


def test_a_cache_lies_where_it_should_and_grows_there():
    """With the sizes of the chunks above, whose program it shares."""
    duo, params = split(SMALL, "model", "float32")
    mesh = make_mesh(jax.devices())
    placed = jax.device_put(params, weights.shardings(mesh, params))
    tokens = jnp.asarray(models.tokens(RAW, batch=2, length=301))
    num, found = jnp.array([301, 301], jnp.int32), []
    options = {"mode": "exact", "implementation": "xla"}
    for first in (16, SLOTS):  # one grows before the second chunk
        sizes = {"batch_size": 2, "max_len": first, "dtype": np.dtype("float32"), "mesh": mesh}
        cache = init_cache(duo, **sizes)
        _, cache = PROGRAMS["prefill"](duo, placed, cache, tokens, num, **options)
        if first < SLOTS:
            cache = grow(cache, max_len=SLOTS)
        assert cache.layers[0].full[0].keys.shape == (2, 3, 1024, 8)  # whole stripes of each
        shard = cache.layers[0].full[0].keys.addressable_shards[5].data
        assert shard.shape == (2, 3, 128, 8)
        logits, cache = PROGRAMS["prefill"](duo, placed, cache, tokens, num, **options)
        [shape] = {x.data.shape for x in cache.layers[0].full[0].keys.addressable_shards}
        assert shape == (2, 3, 128, 8)
        ring = cache.layers[1].streaming
        assert ring is not None
        assert ring.keys.is_fully_replicated
        found.append(np.asarray(logits))
    np.testing.assert_array_equal(*found)


def collectives(compiled) -> dict[str, int]:
    names = ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter")
    text = compiled.as_text()
    return {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in names}


@pytest.mark.parametrize("kv", ["model", pytest.param("int2", marks=pytest.mark.slow)])
def test_a_layer_decodes_with_four_messages(kv):
    mesh, found = make_mesh(jax.devices()), []
    for layers in (1, 2):
        config = parse_config(RAW | {"num_hidden_layers": layers})
        heads = heads_of(CONFIG)[2 : 2 + layers]
        duo = duo_config(config, heads, sink_size=SINK, recent_size=RECENT)
        params = split_params(config, random_params(config), heads)
        placed = jax.device_put(params, weights.shardings(mesh, params))
        cache = init_cache(duo, batch_size=1, max_len=64, kv=kv, mesh=mesh)
        token = jnp.zeros(1, jnp.int32)
        found.append(collectives(PROGRAMS["decode"].lower(duo, placed, cache, token).compile()))
    more = {name: found[1][name] - found[0][name] for name in found[0]}
    assert more == {
        "all-gather": 1,
        "all-to-all": 1,
        "all-reduce": 2,
        "collective-permute": 0,
        "reduce-scatter": 0,
    }


def test_groups_of_one_device_send_no_messages():
    mesh = make_mesh(jax.devices(), data=8)
    duo, params = split(SMALL, "model", "float32")
    placed = jax.device_put(params, weights.shardings(mesh, params))
    cache = init_cache(duo, batch_size=8, max_len=64, mesh=mesh)
    inputs = jax.device_put(jnp.zeros(8, jnp.int32), devices.place(mesh, devices.DATA))
    program = PROGRAMS["decode"].lower(duo, placed, cache, inputs).compile()
    assert not any(collectives(program).values()), collectives(program)


def test_numbers_that_cannot_share_a_model_are_refused():
    assert devices.possible(CONFIG, 8) == [1, 2, 4, 8]
    with pytest.raises(devices.InputError, match=r"^3 devices .* possible: 1, 2, 4, 8$"):
        devices.mesh_of(CONFIG, 3)
    with pytest.raises(
        devices.InputError, match=r"^16 devices .* there are 8; possible: 1, 2, 4, 8"
    ):
        devices.mesh_of(CONFIG, 16)
    assert devices.mesh_of(CONFIG, 1) is None
    assert devices.automatic(CONFIG, lambda: 10**15) is None  # processors share their memory

"""The programs that serve a model: none grows with its settings; layers alike are traced once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import serve
from duo_jax.cache import cache_shapes
from duo_jax.heads.split import duo_config
from duo_jax.model.hf_config import parse_config
from duo_jax.serve import forward
from duo_jax.serve.ahead_of_time import param_shapes
from tests import models
from tests.programs import operations

CONFIG = parse_config(
    models.llama(num_key_value_heads=4, num_attention_heads=8, num_hidden_layers=4)
    | {"max_position_embeddings": 8192}
)
HEADS = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1]], bool)


def trace(chunk: int, *, sink: int, recent: int, max_len: int, heads=HEADS, mode="exact"):
    config = duo_config(CONFIG, heads, sink_size=sink, recent_size=recent)
    read = functools.partial(serve.prefill, config, mode=mode, implementation="xla")
    return jax.make_jaxpr(read)(
        param_shapes(CONFIG, jnp.float32),
        cache_shapes(config, batch_size=1, max_len=max_len),
        jax.ShapeDtypeStruct((1, chunk), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["exact", "chunk"])
@pytest.mark.usefixtures("unhooked")
def test_prefill_does_not_grow(mode):
    sizes = [(16, 4, 96, 512), (8192, 64, 4000, 8192)]
    counts = [
        len(list(operations(
            trace(chunk, sink=sink, recent=recent, max_len=max_len, mode=mode).jaxpr
        )))
        for chunk, sink, recent, max_len in sizes
    ]  # fmt: skip
    assert counts == counts[:1] * len(sizes)


@pytest.mark.parametrize("chunk", [1, 32])
@pytest.mark.usefixtures("unhooked")
def test_layers_that_are_split_alike_are_traced_once(monkeypatch, chunk):
    traced = []

    def attend(*args, plain=forward.attend, **options):
        traced.append(args)
        return plain(*args, **options)

    monkeypatch.setattr(forward, "attend", attend)
    trace(chunk, sink=3, recent=7 + chunk, max_len=64)  # no other test has these sizes
    assert len(traced) == 2  # layers of two retrieval heads, and of one

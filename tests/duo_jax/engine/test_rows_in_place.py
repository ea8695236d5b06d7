"""An engine's steps on a CPU: rings of other rows, and snapshots, are not copied."""

import jax
import jax.numpy as jnp
import pytest

from duo_jax.cache import init_cache
from duo_jax.serve import rows

pytestmark = pytest.mark.usefixtures("unhooked")

SIZES = {"batch_size": 256, "max_len": 256, "num_pages": 4, "page_size": 64}


@pytest.mark.parametrize("kv", ["model", pytest.param("int2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_step_needs_less_than_the_rings_of_a_layer(model, batch_size, kv):
    runtime = model.runtime
    layers = init_cache(runtime.config, dtype=runtime.dtype, kv=kv, **SIZES).layers
    row = jnp.zeros(batch_size, jnp.int32)
    program = rows.decode_rows.lower(
        runtime.config,
        runtime.params,
        layers,
        row,
        row,
        row == 0,
        jnp.zeros((batch_size, 4), jnp.int32),
        implementation="xla",
    ).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(layers))
    rings = [sum(x.nbytes for x in jax.tree.leaves(layer.streaming)) for layer in layers]
    assert memory.temp_size_in_bytes < 0.5 * max(rings)

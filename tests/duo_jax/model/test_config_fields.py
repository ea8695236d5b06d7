"""Every field of a config matters to what the model computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.model import llama, rope
from duo_jax.model.config import ModelConfig, RopeConfig
from duo_jax.model.hf_config import parse_config
from tests import models

# Every field, changed, must change the logits or the parameter tree; or say why not.
NO_EFFECT_ON_LOGITS = {
    "family": "a name; what families differ in are the other fields",
    "max_positions": "a limit that commands check; attention and rope do not read it",
}
CHANGES = {
    "vocab_size": 100,
    "embed_size": 40,
    "mlp_size": 64,
    "num_layers": 3,
    "num_q_heads": 6,
    "num_kv_heads": 1,
    "head_dim": 16,
    "norm_eps": 0.1,
    "rope": RopeConfig(theta=5e5),
    "tie_embeddings": True,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
}
LLAMA_31 = models.CASES["llama-3.1, scaled rope"]
YARN = models.CASES["llama, yarn with mscale"]
YARN = YARN | {  # a longer range, so that the ramp has pairs on either side
    "rope_parameters": YARN["rope_parameters"] | {"original_max_position_embeddings": 256}
}
ROPE_CHANGES = {
    "kind": (models.llama(rope={"rope_type": "linear", "factor": 4.0}), "default"),
    "theta": (models.llama(), 5e5),
    "factor": (LLAMA_31, 2.0),
    "original_max_positions": (LLAMA_31, 16),
    "low_freq_factor": (LLAMA_31, 0.5),
    "high_freq_factor": (LLAMA_31, 8.0),
    "beta_fast": (YARN, 8.0),
    "beta_slow": (YARN, 1.0),
    "attention_factor": (YARN, 2.0),
    "mscale": (YARN, 3.0),
    "mscale_all_dim": (YARN, 2.0),
    "truncate": (YARN, True),  # False there
}


def shapes_of(config: ModelConfig) -> dict:
    return jax.eval_shape(lambda: llama.init_params(config, jax.random.key(0)))


def random_params(config: ModelConfig) -> dict:
    """Draw from numpy, biases and norms too, so that no parameter sits at a neutral value."""
    rng = np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(0.4 * rng.standard_normal(x.shape, np.float32))

    return jax.tree.map(draw, shapes_of(config))


@functools.cache
def logits_of(config: ModelConfig) -> np.ndarray:
    tokens = jnp.asarray(models.tokens({"vocab_size": config.vocab_size}))
    # Compiling is what these tests wait for.
    run = jax.jit(llama.Llama(config).apply, compiler_options={"xla_backend_optimization_level": 0})
    return np.asarray(run({"params": random_params(config)}, tokens, None, None))


def test_every_field_is_listed_once():
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    assert sorted(fields) == sorted([*CHANGES, *NO_EFFECT_ON_LOGITS])
    assert sorted(ROPE_CHANGES) == sorted(field.name for field in dataclasses.fields(RopeConfig))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("field", CHANGES)
def test_every_model_field_is_read(field):
    config = parse_config(models.llama())
    changed = dataclasses.replace(config, **{field: CHANGES[field]})
    assert changed != config
    before, after = shapes_of(config), shapes_of(changed)
    if jax.tree.structure(before) != jax.tree.structure(after):
        return
    if jax.tree.leaves(before) != jax.tree.leaves(after):
        return
    assert np.abs(logits_of(config) - logits_of(changed)).max() > 1e-3


@pytest.mark.parametrize("field", NO_EFFECT_ON_LOGITS)
def test_exempt_fields_really_have_no_effect(field):
    config = parse_config(models.llama())
    changed = dataclasses.replace(config, **{field: {"family": "qwen3", "max_positions": 7}[field]})
    np.testing.assert_array_equal(logits_of(config), logits_of(changed))


def rotation_of(config: ModelConfig) -> np.ndarray:
    return np.stack(rope.rotation(config, jnp.arange(models.LENGTH)[None]))


@pytest.mark.parametrize("field", ROPE_CHANGES)
def test_every_rope_field_changes_the_rotation(field):
    raw, value = ROPE_CHANGES[field]
    config = parse_config(raw)
    changed = dataclasses.replace(config.rope, **{field: value})
    assert changed != config.rope
    differs = rotation_of(config) - rotation_of(dataclasses.replace(config, rope=changed))
    assert np.abs(differs).max() > 1e-3

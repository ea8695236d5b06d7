"""Random parameters of any model, quickly and with nothing left at its initial constant."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig


def random_params(config: ModelConfig, *, seed: int = 0, dtype=jnp.float32) -> dict[str, Any]:
    """Draw parameters whose biases are not 0 and whose norms are not 1.

    They are numpy's: to split and to look into those of jax compiles a program for every shape.
    """
    shapes = jax.eval_shape(lambda: llama.init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape) * config.embed_size**-0.5
        x = x + 1 if path[-1].key == "scale" else x
        return x.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)

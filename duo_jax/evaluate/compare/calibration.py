"""What methods know of the model before they see a task: measured on training text, once."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from duo_jax.api import DuoModel
from duo_jax.checkpoints import pretrained
from duo_jax.data.documents import split_held_out
from duo_jax.data.passkey_templates import PasskeyTemplates
from duo_jax.data.passkeys import PasskeyConfig, PasskeySampler
from duo_jax.evaluate.compression import chai
from duo_jax.evaluate.eviction.prompt import read
from duo_jax.evaluate.results.forced import pad
from duo_jax.heads.attention_profile import attention_profile
from duo_jax.mesh import devices
from duo_jax.session.runtime import Runtime
from kernels import Implementation


def training_sampler(
    templates: PasskeyTemplates,
    split: DuoModel,
    documents: Sequence[str],
    *,
    length: int,
    seed: int,
) -> PasskeySampler:
    """Return a sampler of training text."""
    data = PasskeyConfig(**dataclasses.asdict(templates), min_length=1, max_length=length)
    return PasskeySampler(data, split.tokenizer, split_held_out(documents)[0], seed=seed)


def profile(
    model: str,
    split: DuoModel,
    sampler: PasskeySampler,
    *,
    samples: int,
    length: int,
    implementation: Implementation,
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return the attention profile."""
    mesh = split.runtime.mesh
    params = pretrained.load_params(pretrained.resolve(model), dtype=split.runtime.dtype, mesh=mesh)
    with devices.within(mesh):
        return attention_profile(
            split.config.architecture,
            params,
            [sampler.sample(i, length=length) for i in range(samples)],
            sink_size=split.config.sink_size,
            recent_size=split.config.recent_size,
            implementation=implementation,
        )


def clustering_losses(
    full: Runtime, sampler: PasskeySampler, *, samples: int
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return what CHAI loses with 1, 2, ... clusters of heads, by the first tokens of texts."""
    texts = [sampler.plain_text(i).tokens[: chai.FIRST] for i in range(samples)]
    noting = chai.CHAI(clusters=())
    rows = pad(texts, max(text.size for text in texts))
    with devices.within(full.mesh):
        prompt = read(full.config, full.params, *rows, window=1, noting=noting)
    return chai.losses(np.asarray(prompt.noted))

"""Head scores that KVzip's authors publish: utils/head_score/*.pt of their code.

https://github.com/snu-mllab/KVzip: test.py writes one tensor [layers, KV heads], the highest score
of each head's keys. The files are pickles, which can run code when they are opened; PyTorch's
weights_only=True refuses everything but tensors. A file that large models need has some kilobytes.
"""

import pathlib

import numpy as np
from jaxtyping import Float

from duo_jax import files
from duo_jax.errors import InputError

_MAX_BYTES = 4 << 20
_MOST_SCORES = 100_000


def read_scores(path: pathlib.Path) -> Float[np.ndarray, "layers kv_heads"]:
    """Return the scores of a file.

    Raises:
      InputError: it cannot be read, or holds something else; or PyTorch is missing.
    """
    try:
        import torch
    except ImportError:
        raise InputError("reading .pt files needs PyTorch: pip install 'duo_jax[pickle]'") from None
    with files.reading(path):
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} has more than {_MAX_BYTES:,} bytes; head scores have few")
    try:
        scores = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and file errors have no common class
        raise InputError(f"{path} cannot be read as head scores: {type(error).__name__}") from None
    if not torch.is_tensor(scores) or not scores.is_floating_point():
        raise InputError(f"{path} holds something else than a tensor of scores")
    if not 1 <= scores.numel() <= _MOST_SCORES:
        raise InputError(f"{path} holds {scores.numel():,} scores, not 1 to {_MOST_SCORES:,}")
    scores = scores.squeeze()
    if scores.ndim != 2:
        raise InputError(f"{path} holds scores of shape {tuple(scores.shape)}, not layers x heads")
    return scores.detach().to(torch.float64).numpy()

"""GGUF files, llama.cpp's format: weights, config and tokenizer of a model in one file.

The file is

    "GGUF", version, number of tensors, number of metadata entries
    metadata            name, type, value: architecture, sizes, vocabulary, chat template
    tensor infos        name, dimensions, type, offset
    data                aligned

The `gguf` package knows the types of tensors, and turns blocks of quantised weights into numbers.
Its reader of files trusts them, so `header` reads them here, within bounds. Config (`config`),
tensors (`tensors`) and tokenizer (`tokenizer`) are rebuilt from what it finds, without torch.
"""

from duo_jax.checkpoints.gguf.config import hf_config, read_config
from duo_jax.checkpoints.gguf.header import is_gguf, read_header, refuse_folder
from duo_jax.checkpoints.gguf.tensors import GgufTensors

__all__ = [
    "GgufTensors",
    "hf_config",
    "is_gguf",
    "read_config",
    "read_header",
    "refuse_folder",
]

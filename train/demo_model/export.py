"""The finished demo model as a Hugging Face folder."""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import save_file

from duo_jax import files
from duo_jax.checkpoints import tensor_names
from duo_jax.data.passkey_templates import filled
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from duo_jax.model.hf_config import to_hf
from train.demo_model.presets import EVALUATION, PRESET, TEMPLATES
from train.demo_model.tokenizer import write_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Facts about the training, for the model card."""

    steps: int
    seconds: float
    seed: int
    table: str


def rounded(params: PyTree) -> PyTree:
    """Round weights to float16, as they are stored, and back to float32."""
    return jax.tree.map(lambda x: x.astype("float16").astype("float32"), params)


def write_model(
    folder: pathlib.Path,
    architecture: ModelConfig,
    params: llama.Params,
    documents: list[str],
    summary: Summary,
) -> None:
    """Write config, weights (float16), tokenizer, identification preset and model card.

    Args:
      folder: an existing folder.
      architecture: the model's, of the Llama family.
      params: its parameters.
      documents: the text that the tokenizer is trained on.
      summary: for the model card.
    """
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    _write_json(folder / "config.json", to_hf(architecture) | {"dtype": "float16"} | tokens)
    _write_json(folder / "generation_config.json", tokens | {"do_sample": False})
    _write_json(folder / "identify.json", PRESET)
    _write_json(folder / "evaluate.json", EVALUATION)
    write_tokenizer(
        folder,
        documents,
        TEMPLATES,
        vocab_size=architecture.vocab_size,
        max_length=architecture.max_positions,
    )
    tensors = {t.name: t.to_hf(_leaf(params, t)) for t in tensor_names.tensors(architecture)}
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the library leaves it to its owner
    files.write_text(folder / "README.md", _card(architecture, summary))


def _leaf(params: llama.Params, tensor: tensor_names.Tensor) -> np.ndarray:
    leaf: Any = params
    for name in tensor.path:
        leaf = leaf[name]
    array = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
    return array.astype(np.float16)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(values, indent=2) + "\n")


def _card(architecture: ModelConfig, summary: Summary) -> str:
    parameters = sum(t.size for t in tensor_names.tensors(architecture))
    shape = (
        f"{architecture.num_layers} layers, width {architecture.embed_size}, "
        f"{architecture.num_q_heads} query and {architecture.num_kv_heads} KV heads of "
        f"{architecture.head_dim}"
    )
    example = (
        filled(TEMPLATES.needle, "third").replace("{passkey}", " value order call match").strip()
    )
    question = filled(TEMPLATES.question, "third")
    return f"""\
---
license: apache-2.0
library_name: transformers
tags: [duo_jax, duo-attention, demo]
---

# duo_jax demo model

A Llama of {parameters:,} parameters ({shape}) that finds passkeys
in up to {architecture.max_positions:,} tokens of text. It shows how DuoAttention works; it can \
do nothing
else: its English is nonsense.

The text may hold lines such as

    {example}

and at its end the model continues "{question}" with the words of that passkey. Words are entries
of its vocabulary, of one token each.

Made by `python -m train.demo_model --seed {summary.seed}`: {summary.steps:,} steps, \
{summary.seconds / 60:.0f} minutes on a CPU, from the language
reference that comes with Python {platform.python_version()} (`pydoc_data.topics`, a tenth
of it held out), with jax {importlib.metadata.version("jax")}. Other versions of Python carry
another text, so weights and tokenizer belong together. `identify.json` holds the settings with
which `python -m train.identify` finds its retrieval heads, `evaluate.json` those of
`python -m duo_jax.evaluate`. The last two stages of its training round keys and values to 4 bits,
so that it survives 4-bit caches with only {architecture.head_dim} channels per head.

Exact retrieval (every token of a passkey right) on held-out text, and by depth with full attention:

{summary.table}

"All streaming": every head sees {PRESET["sink"]} sinks and {PRESET["recent"]} recent tokens only.
"""

"""Write what a GGUF file holds besides weights as the files of a Hugging Face folder."""

import json
import pathlib

from duo_jax.checkpoints import gguf
from duo_jax.checkpoints.gguf.tokenizer import end_tokens, load_tokenizer


def write(source: pathlib.Path, target: pathlib.Path, *, dtype: str) -> None:
    """Write config.json, generation_config.json, the tokenizer and the chat template.

    Args:
      source: the GGUF file.
      target: where to; an existing folder.
      dtype: the type that config.json names, in which transformers loads the weights.

    Raises:
      InputError: the file cannot be read.
    """
    header = gguf.read_header(source)
    config = gguf.hf_config(header) | {"dtype": dtype}
    ends = end_tokens(header)
    tokens = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
    settings = tokens | ({"eos_token_id": ends} if ends else {})
    for name, content in (("config.json", config), ("generation_config.json", settings)):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    load_tokenizer(header).save_pretrained(target)

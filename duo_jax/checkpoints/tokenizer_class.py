"""What config.json says about the tokenizer: transformers, asked for one, would check all of it."""

import pathlib
from typing import Any

from duo_jax import files
from duo_jax.model.config import FAMILIES
from duo_jax.schema.json_reader import read_json

_READ = ("tokenizer_class", "model_name", "_name_or_path")


def tokenizer_config(folder: pathlib.Path) -> Any:
    """Return a config of transformers that only names the model's family and its tokenizer's class.

    None where there is no config.json of a family that is supported: transformers then looks
    itself. So a null that is good for the model is not blamed on its tokenizer.
    """
    file = folder / "config.json"
    raw = read_json(file) if files.present(file) else {}
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        return None
    from transformers import AutoConfig  # takes seconds to import

    named = {key: raw[key] for key in _READ if isinstance(raw.get(key), str)}
    return AutoConfig.for_model(family, name_or_path=str(folder), **named)

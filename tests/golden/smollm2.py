"""Write what transformers reads of SmolLM2's GGUF file: tokens of a page, digests of weights.

Needs torch and the model. Run from the repository root:

    python -m tests.golden.smollm2
"""

import hashlib
import json
import pathlib

import numpy as np

from tests.golden import gguf_tokens

FILE = pathlib.Path(__file__).with_name("smollm2.json")
_TENSORS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.29.self_attn.v_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
    "model.norm.weight",
)
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)


def prompt(key: str) -> str:
    """Return a chat of about 500 tokens that hides a pass key and asks for it."""
    hidden = f"The pass key is {key}. Remember it. {key} is the pass key. "
    text = f"{_FILLER * 8}{hidden}{_FILLER * 11}What is the pass key?"
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\nThe pass key is"


def digest(array: np.ndarray) -> str:
    """Return a digest of an array, which does not depend on the sign of zero."""
    return hashlib.sha256((np.ascontiguousarray(array, np.float32) + 0.0).tobytes()).hexdigest()


def main() -> None:
    """Write the file."""
    import torch
    from transformers import AutoModelForCausalLM

    from convert import fetch

    file = fetch.fetch("smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    weights = model.state_dict()
    digests = {name: digest(weights[name].float().numpy()) for name in _TENSORS}
    content = {"digests": digests, "tokens": gguf_tokens.of_transformers(file)}
    FILE.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

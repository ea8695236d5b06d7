"""Write parity.npz: what transformers computes, rung by rung, for the tiny models of tests.models.

Needs torch. Run from the repository root when a case is added or changed:

    python -m tests.golden.generate

Where torch is installed the tests compare with transformers itself and with this file; elsewhere
(Python 3.12 in our CI) with this file alone.
"""

import pathlib
import tempfile

import numpy as np

from tests import models

FILE = pathlib.Path(__file__).with_name("parity.npz")


def transformers_ladder(folder: pathlib.Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Run transformers and return what each part of layer 0 and the whole model put out."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    seen = {}

    def keep(name):
        def hook(_module, _inputs, output):
            seen[name] = output

        return hook

    layer = model.model.layers[0]
    layer.input_layernorm.register_forward_hook(keep("norm"))
    model.model.rotary_emb.register_forward_hook(keep("rope"))
    layer.self_attn.register_forward_hook(keep("attention"))
    layer.register_forward_hook(keep("layer"))
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits
    half = seen["rope"][0].shape[-1] // 2
    first = {k: v[0] if isinstance(v, tuple) else v for k, v in seen.items() if k != "rope"}
    result = {
        "norm": first["norm"],
        "rope_cos": seen["rope"][0][0, :, :half],
        "rope_sin": seen["rope"][1][0, :, :half],
        "attention": first["attention"],
        "layer": first["layer"],
        "logits": logits,
    }
    return {name: value.float().numpy() for name, value in result.items()}


def main() -> None:
    """Write the file."""
    golden = {}
    for name, raw in models.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            models.write_hf(pathlib.Path(folder), raw)
            # One row is enough to notice a difference; it keeps the file small.
            tokens = models.tokens(raw, batch=1)
            for rung, value in transformers_ladder(pathlib.Path(folder), tokens).items():
                golden[f"{name}/{rung}"] = value.astype(np.float32)
    np.savez_compressed(FILE, **golden)
    print(f"{FILE}: {len(golden)} arrays, {FILE.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()

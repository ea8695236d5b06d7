"""Write what transformers computes for the tiny models of tests.models.

    parity.npz   one forward, rung by rung
    greedy.npz   the tokens of `generate`, with the smallest lead that a chosen token had

Needs torch. Run from the repository root when a case is added or changed:

    python -m tests.golden.generate

Where torch is installed the tests compare with transformers itself and with these files; elsewhere
(Python 3.12 in our CI) with these files alone.
"""

import pathlib
import tempfile

import numpy as np

from tests import models

FILE = pathlib.Path(__file__).with_name("parity.npz")
GREEDY_FILE = FILE.with_name("greedy.npz")
PROMPT_LENGTHS = (models.LENGTH, 7, 20)  # the first is beyond the original range of scaled rope
NEW_TOKENS = 16
PENALTY = 1.3


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


def prompts(raw: dict) -> list[list[int]]:
    """Return prompts of different lengths."""
    return [
        models.tokens(raw, batch=1, length=length, seed=seed)[0].tolist()
        for seed, length in enumerate(PROMPT_LENGTHS)
    ]


def transformers_greedy(folder: pathlib.Path, raw: dict) -> dict[str, np.ndarray]:
    """Continue prompts one by one with transformers' `generate`.

    Returns:
      The new tokens [prompt, step] of all prompts, those of the last prompt with a repetition
      penalty, and the smallest lead of a chosen token's score over the second best: a comparison
      means something only where this is far above rounding.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    leads = []

    def write(prompt: list[int], penalty: float) -> list[int]:
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            repetition_penalty=penalty,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(result.scores).float().topk(2).values
        leads.append(float((best[..., 0] - best[..., 1]).min()))
        return result.sequences[0, len(prompt) :].tolist()

    rows = prompts(raw)
    return {
        "plain": np.array([write(row, 1.0) for row in rows], np.int32),
        "penalty": np.array([write(rows[-1], PENALTY)], np.int32),
        "lead": np.float32(min(leads)),
    }


def main() -> None:
    """Write the files."""
    golden, written = {}, {}
    for name, raw in models.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            models.write_hf(pathlib.Path(folder), raw)
            # One row is enough to notice a difference; it keeps the file small.
            tokens = models.tokens(raw, batch=1)
            for rung, value in transformers_ladder(pathlib.Path(folder), tokens).items():
                golden[f"{name}/{rung}"] = value.astype(np.float32)
            for key, value in transformers_greedy(pathlib.Path(folder), raw).items():
                written[f"{name}/{key}"] = value
    for file, arrays in ((FILE, golden), (GREEDY_FILE, written)):
        np.savez_compressed(file, **arrays)
        print(f"{file}: {len(arrays)} arrays, {file.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()

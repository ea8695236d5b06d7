"""One model by three names: Hugging Face folder, hub name, converted checkpoint. Equal gates."""

import importlib.util
import pathlib

import pytest

from convert.__main__ import main as convert
from tests import models
from tests.train.conftest import TINY_FLAGS
from train.identify.__main__ import main as identify

FAMILIES = {
    "llama": models.llama(vocab_size=600, max_position_embeddings=512),
    "qwen3": models.qwen3(vocab_size=600, max_position_embeddings=512),
}


def make_checkpoint(folder: pathlib.Path, raw: dict) -> pathlib.Path:
    """Make a model with transformers and train it a few steps; without torch, a random one."""
    if importlib.util.find_spec("torch") is None:
        return models.write_tokenizer(models.write_hf(folder, raw, dtype="bfloat16"))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {k: v for k, v in raw.items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model(raw["model_type"], **values)
    model = AutoModelForCausalLM.from_config(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor(models.tokens(raw, batch=4, length=64), dtype=torch.long)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(folder)
    return models.write_tokenizer(folder)


@pytest.mark.parametrize("raw", FAMILIES.values(), ids=FAMILIES.keys())
def test_gates_do_not_depend_on_how_the_model_is_stored(tmp_path, monkeypatch, raw):
    name = raw["model_type"]
    folder = make_checkpoint(tmp_path / "hf", raw)

    cached = tmp_path / "hub" / f"models--tiny--{name}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123456789abcdef")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "0123456789abcdef").symlink_to(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    convert([str(folder), str(tmp_path / "converted")])

    gates = {}
    for source in (str(folder), f"tiny/{name}", str(tmp_path / "converted")):
        workdir = tmp_path / ("run-" + source.replace("/", "_"))
        identify(["--model", source, "--workdir", str(workdir), *TINY_FLAGS])
        gates[source] = (workdir / "pattern" / "full_attention_heads.tsv").read_bytes()
    assert len(set(gates.values())) == 1
    assert b"1.000000000000000000e+00\t1.000000000000000000e+00\n" * 2 not in gates.values()

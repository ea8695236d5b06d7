"""Conversion of GGUF files: the same weights, config and tokenizer in both other forms."""

import json

import jax
import numpy as np
import pytest

import duo_jax
from convert.__main__ import main
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.plan import __main__ as plan_command
from duo_jax.session.tokenization import load_tokenization
from tests import gguf_files, models
from tests.convert.test_convert_process import LARGE, MB, growth
from tests.golden import gguf_tokens

# The head_dim is not the width by the heads, and rope is scaled.
RAW = models.CASES["llama-3.1, scaled rope"] | {"vocab_size": 1024}


def write(folder, *, tokenizer=None):
    tokenizer = tokenizer or gguf_files.byte_level("llama-bpe", add_bos_token=True)
    gguf_files.write(folder / "m.gguf", RAW, stored=gguf_files.Q8_0, tokenizer=tokenizer)
    return folder / "m.gguf"


@pytest.mark.slow
def test_to_a_checkpoint_and_on_to_hugging_face(tmp_path):
    file = write(tmp_path)
    checkpoint, folder, direct = (tmp_path / name for name in ("checkpoint", "hf", "direct"))
    main([str(file), str(checkpoint)])
    main(["--to-hf", str(checkpoint), str(folder)])
    main(["--to-hf", str(file), str(direct)])
    expected = pretrained.load_params(file)
    for model in (checkpoint, folder, direct):
        assert pretrained.load_config(model) == pretrained.load_config(file)
        jax.tree.map(np.testing.assert_array_equal, pretrained.load_params(model), expected)


def test_every_form_of_a_model_writes_the_same(tmp_path):
    file = write(tmp_path)
    main(["--to-hf", str(file), str(tmp_path / "hf")])
    texts = [
        duo_jax.load(model, pattern="none", weights="int8").generate(
            ["the world and"], max_new_tokens=5, temperature=2.0
        )
        for model in (file, tmp_path / "hf")
    ]
    assert texts[0] == texts[1] != [""]
    with pytest.raises(InputError, match="has no pattern of its own"):
        duo_jax.load(file)


@pytest.mark.slow
def test_the_planner_takes_the_file(tmp_path, capsys):
    plan_command.main(["--model", str(write(tmp_path)), "--pattern", "none"])
    assert "no streaming heads of 4" in capsys.readouterr().out


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "sentencepiece", "sentencepiece, EOS"])
def test_the_tokenizer_comes_along(tmp_path, name):
    file = write(tmp_path, tokenizer=gguf_tokens.TOKENIZERS[name])
    main(["--to-hf", str(file), str(tmp_path / "hf")])
    before, after = load_tokenization(file), load_tokenization(tmp_path / "hf")
    assert after.stop_tokens == before.stop_tokens
    assert after.tokenizer.special_tokens_map == before.tokenizer.special_tokens_map
    chat = [{"role": "user", "content": "the <|end|>"}]
    assert after.render_chat(chat) == before.render_chat(chat)
    tokens = before.encode(gguf_tokens.PAGE)
    assert after.encode(gguf_tokens.PAGE) == tokens
    assert after.tokenizer.decode(tokens) == before.tokenizer.decode(tokens)


def test_config_json_says_what_transformers_needs(tmp_path):
    main(["--to-hf", str(write(tmp_path)), "--dtype", "bfloat16", str(tmp_path / "hf")])
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    settings = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert settings["eos_token_id"] == [config["eos_token_id"]]


@pytest.mark.slow
def test_host_memory_is_a_few_tensors_not_the_model(tmp_path):
    """24 equal tensors of 4M numbers, which take 16 MB as float32 and 403 MB in all.

    Measured: 51 MB to safetensors, importing transformers included, and 62 MB to int4.
    """
    raw = LARGE | {"num_hidden_layers": 8, "vocab_size": 1024}
    block = np.random.default_rng(0).standard_normal((1024, 1024), np.float32) * 0.02
    block = gguf_files.gguf.quantize(block, gguf_files.Q8_0)
    wide, deep = np.tile(block, (4, 1)), np.tile(block, (1, 4))
    tensors = models.hf_tensors(raw | {"num_hidden_layers": 1, "intermediate_size": 8})
    tensors = {name: array for name, array in tensors.items() if "mlp" not in name}
    for layer in range(8):
        for name, array in list(tensors.items()):
            tensors[name.replace("layers.0", f"layers.{layer}")] = array
        mlp = f"model.layers.{layer}.mlp"
        tensors |= {f"{mlp}.gate_proj.weight": wide, f"{mlp}.up_proj.weight": wide}
        tensors |= {f"{mlp}.down_proj.weight": deep}
    file = tmp_path / "large.gguf"
    tokenizer = gguf_files.byte_level("qwen2")
    gguf_files.write(file, raw, stored=gguf_files.Q8_0, tokenizer=tokenizer, tensors=tensors)
    copy, int4 = growth(
        ["--to-hf", file, tmp_path / "copy"], [file, tmp_path / "int4", "--weights", "int4"]
    )
    total = 24 * 16 * MB
    assert copy < 0.2 * total
    assert int4 < 0.4 * total

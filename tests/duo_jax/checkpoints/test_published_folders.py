"""Folders as they are published: weights under other names, tied or not, and what is no model.

Where torch is installed, transformers reads the same folders.
"""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.__main__ import main as convert
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.model import llama
from tests import models
from tests.spanning import spanning

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
RAW = models.llama(num_hidden_layers=1)
TIED = RAW | {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.0.self_attn."


def hf_tensors() -> dict[str, np.ndarray]:
    return models.hf_tensors(RAW)  # with an output projection of its own


def write(folder: pathlib.Path, raw: dict, tensors: dict) -> pathlib.Path:
    folder.mkdir(parents=True)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens):
    return llama.Llama(config).apply({"params": params}, tokens, None, None)


def logits(folder: pathlib.Path) -> np.ndarray:
    config, params = pretrained.load_config(folder), pretrained.load_params(folder)
    return np.asarray(run(config, params, jnp.asarray(models.tokens(RAW, batch=1))))


def transformers_logits(folder: pathlib.Path) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(models.tokens(RAW, batch=1), dtype=torch.long)).logits.numpy()


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in hf_tensors().items() if key != name}


def renamed(change) -> dict[str, np.ndarray]:
    return {change(name): array for name, array in hf_tensors().items()}


def with_head(head: np.ndarray) -> dict[str, np.ndarray]:
    return hf_tensors() | {HEAD: head}


NAMES = {
    "without model.": lambda name: name.removeprefix("model."),
    "model. twice": lambda name: f"model.{name}",
}
WRAPPED = {  # transformers draws new weights at random for them
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "module._orig_mod., without model.": lambda n: f"module._orig_mod.{n.removeprefix('model.')}",
    "wrapped layers": lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
}
BUFFERS = {
    f"{LAYER}rotary_emb.inv_freq": np.ones(4, np.float32),
    f"{LAYER}rotary_emb.cos_cached": np.ones((128, 8), np.float64),
    f"{LAYER}rotary_emb.sin_cached": np.ones((128, 8), np.float32),
    f"{LAYER}masked_bias": np.float32([-1e4]),
    f"{LAYER}bias": np.ones((1, 1, 8, 8), np.bool_),
    "model.rotary_emb.inv_freq": np.ones(4, np.float32),
    "rope.freqs": np.ones(4, np.float32),
}
# Name: config.json, tensors in the file, and the tensor that must be the output projection.
FOLDERS = {
    "tied but different": (TIED, hf_tensors(), HEAD),
    "tied and equal": (TIED, with_head(hf_tensors()[EMBEDDING]), EMBEDDING),
    "tied, without a head": (TIED, without(HEAD), EMBEDDING),
    "tied, without an embedding": (TIED, without(EMBEDDING), HEAD),
    "tied, without a head and model.": (
        TIED,
        {name.removeprefix("model."): array for name, array in without(HEAD).items()},
        EMBEDDING,
    ),
    "untied and equal": (RAW, with_head(hf_tensors()[EMBEDDING]), EMBEDDING),
    "buffers": (RAW, hf_tensors() | BUFFERS, HEAD),
    **{name: (RAW, renamed(change), HEAD) for name, change in (NAMES | WRAPPED).items()},
}
every_folder = pytest.mark.parametrize(
    ("raw", "tensors", "head"), FOLDERS.values(), ids=FOLDERS.keys()
)


def plain(folder: pathlib.Path, tensors: dict, head: str) -> pathlib.Path:
    """Write the same model as transformers would, untied."""
    tables = {EMBEDDING: hf_tensors()[EMBEDDING], HEAD: hf_tensors()[head]}
    if not any("embed_tokens" in name for name in tensors):
        tables[EMBEDDING] = hf_tensors()[head]
    return write(folder, RAW, hf_tensors() | tables)


@pytest.mark.one_in(2)
@every_folder
def test_a_folder_gives_the_logits_of_the_plain_one(tmp_path, raw, tensors, head):
    folder = write(tmp_path / "model", raw, tensors)
    want = logits(plain(tmp_path / "plain", tensors, head))
    np.testing.assert_allclose(logits(folder), want, rtol=1e-5, atol=1e-5)
    tied = raw["tie_word_embeddings"] and not (EMBEDDING in tensors and head == HEAD)
    assert pretrained.load_config(folder).tie_embeddings == tied


@needs_torch
@pytest.mark.parametrize("name", sorted(FOLDERS.keys() - WRAPPED.keys()))
def test_transformers_reads_the_folder_so(tmp_path, name):
    raw, tensors, _ = FOLDERS[name]
    folder = write(tmp_path / "model", raw, tensors)
    np.testing.assert_allclose(logits(folder), transformers_logits(folder), rtol=1e-4, atol=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "weights"),
    spanning(
        ["tied but different", "tied, without an embedding", "_orig_mod."],
        ["model", "int8", "int4"],
    ),
)
def test_conversion_keeps_the_head(tmp_path, name, weights):
    raw, tensors, head = FOLDERS[name]
    folder = write(tmp_path / "model", raw, tensors)
    convert([str(folder), str(tmp_path / "converted"), "--weights", weights])
    heads = np.ones((1, 2), bool)
    ours = pretrained.load_split_params(tmp_path / "converted", heads, weights=weights)
    want = pretrained.load_split_params(folder, heads, weights=weights)
    architecture = pretrained.load_config(tmp_path / "converted")
    assert architecture == pretrained.load_config(folder)
    table = ours["embed_tokens"]["embedding"]
    got = table if architecture.tie_embeddings else ours["lm_head"]["kernel"].T
    np.testing.assert_array_equal(got, hf_tensors()[head])
    assert ours.keys() == want.keys()
    if weights == "model":
        convert(["--to-hf", str(tmp_path / "converted"), str(tmp_path / "back")])
        written = load_file(tmp_path / "back" / "model.safetensors")
        np.testing.assert_array_equal(written.get(HEAD, written[EMBEDDING]), hf_tensors()[head])
        assert pretrained.load_config(tmp_path / "back") == architecture


def test_types_do_not_untie_embeddings(tmp_path):
    """The same values, the one in bfloat16 and the other in float32."""
    rounded = hf_tensors()[EMBEDDING].astype(ml_dtypes.bfloat16)
    tensors = with_head(rounded) | {EMBEDDING: rounded.astype(np.float32)}
    assert pretrained.load_config(write(tmp_path / "model", TIED, tensors)).tie_embeddings


@pytest.mark.parametrize(
    ("raw", "tensors", "message"),
    [
        (RAW, without(HEAD), "1 missing: lm_head.weight$"),
        (
            TIED,
            {k: v for k, v in without(HEAD).items() if k != EMBEDDING},
            "1 missing: model.embed",
        ),
        (TIED, with_head(np.ones((9, 32), np.float32)), r"of another shape: lm_head.weight is \[9"),
        (
            RAW,
            hf_tensors() | {"norm.weight": np.ones(32, np.float32)},
            "are both model.norm.weight",
        ),
        (RAW, hf_tensors() | {f"{LAYER}q_proj.lora_A.weight": np.ones(3, np.float32)}, "of a LoRA"),
    ],
    ids=["no head", "neither", "head of another shape", "twice", "LoRA"],
)
def test_weights_of_no_whole_model_are_refused(tmp_path, raw, tensors, message):
    folder = write(tmp_path / "model", raw, tensors)
    with pytest.raises(InputError, match=message):
        pretrained.load_params(folder)


ADAPTER = '{"base_model_name_or_path": "org/base", "peft_type": "LORA"}'
NO_MODELS = {
    "adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": "", "optimizer.pt": ""},
        "is an adapter (LoRA) of 'org/base', no model; merge it into its model first",
    ),
    "adapter of a broken kind": (
        {"adapter_config.json": '{"base_model_name_or_path": 3}', "config.json": "{}"},
        "is an adapter (LoRA), no model",
    ),
    "pickled adapter": ({"adapter_model.bin": "", "training_args.bin": ""}, "is an adapter (LoRA)"),
    "trainer's state": (
        {"optimizer.pt": "", "scheduler.pt": "", "training_args.bin": "", "config.json": "{}"},
        "holds the state of a training run (optimizer.pt), but no weights; save the model with",
    ),
    "training_args only": ({"training_args.bin": ""}, "a training run (training_args.bin)"),
    "trainer's folder": (
        {"checkpoint-500/model.safetensors": "", "checkpoint-1000/optimizer.pt": ""},
        "is the folder of a training run, no model; name one of its checkpoints, such as ",
    ),
    "DeepSpeed": (
        {"global_step500/mp_rank_00_model_states.pt": "", "zero_to_fp32.py": "", "latest": ""},
        "is a checkpoint of DeepSpeed (global_step500), no model; make one with its zero_to_fp32",
    ),
    "FSDP": (
        {"pytorch_model_fsdp_0/__0_0.distcp": "", "optimizer_0/__0_0.distcp": ""},
        "is a sharded checkpoint of a training run (pytorch_model_fsdp_0), no model",
    ),
    "Meta's own": ({"consolidated.00.pth": "", "params.json": "{}"}, "converted for transformers"),
    "GGUF": ({"model.Q4_0.gguf": ""}, "weights as GGUF; name the file"),
    "TensorFlow": ({"tf_model.h5": "", "config.json": "{}"}, "for TensorFlow only"),
    "other names": ({"model.fp16.safetensors": ""}, "safetensors under other names than"),
}


@pytest.mark.parametrize(("files", "words"), NO_MODELS.values(), ids=NO_MODELS.keys())
@pytest.mark.parametrize("read", [pretrained.load_config, pretrained.load_params])
def test_what_is_no_model_is_told_what_it_is(tmp_path, files, words, read):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert words in str(error.value)
    assert "allow-pickle" not in str(error.value)


def test_a_planner_is_told_too(tmp_path):
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    with pytest.raises(InputError, match="is an adapter"):
        pretrained.resolve_config(tmp_path)


def test_a_model_beside_the_state_of_its_training_is_one(tmp_path):
    folder = write(tmp_path / "model", RAW, hf_tensors())
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json"):
        (folder / name).write_text("")
    assert pretrained.load_config(folder).num_layers == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": None},
        {"hidden_act": None},
        {"attention_bias": None, "initializer_range": None, "attention_dropout": None},
        {"partial_rotary_factor": None, "torch_dtype": 3},
    ],
)
def test_a_config_that_is_good_for_the_model_is_good_for_its_tokenizer(tmp_path, changes):
    """Asked for a tokenizer's class, transformers checks all of config.json."""
    models.write_tokenizer(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, tokenizer["merges"])))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(RAW | changes))
    assert len(pretrained.load_tokenizer(tmp_path)("Remember them.")["input_ids"]) > 1

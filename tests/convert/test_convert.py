"""Conversion both ways: every bit, every family, every dtype, with transformers as the judge."""

import importlib.util
import json
import os
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import other_files
from convert.__main__ import main
from duo_jax.checkpoints import pretrained
from duo_jax.checkpoints.orbax_checkpoint import flattened
from duo_jax.checkpoints.weights import open_weights
from duo_jax.errors import InputError
from duo_jax.evaluate.passkeys import command as passkeys
from tests import models
from tests.spanning import spanning

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
DTYPES = ["bfloat16", "float16", "float32"]

OTHER_FILES = {
    "generation_config.json": b'{"eos_token_id": 1 }',
    "tokenizer.json": b'{"a":  1}',
    "tokenizer_config.json": b"{}\n\n",
    "special_tokens_map.json": b"{ }",
    "tokenizer.model": bytes(range(256)),
    "chat_template.jinja": b"{{ messages }}",
    "identify.json": b'{"sink": 8}',
    "evaluate.json": b'{"passkeys": {}}',
    "prompt.txt": b"Once upon a time",
    "README.md": b"# A model",
    "pattern/full_attention_heads.tsv": b"1.0\t0.0\n",
    "pattern/config.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "modelling.py": b"raise SystemExit",
}
NOT_COPIED = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "optimizer.pt",
    "model.Q4_K_M.GGUF",
    ".gitattributes",
    ".git/HEAD",
    ".cache/huggingface/x.lock",
    "pattern/.DS_Store",
    "onnx/config.json",
    "onnx/model.onnx",
    "checkpoint-5/trainer_state.json",
    "checkpoint-5/global_step5/mp_rank_00_model_states.pt",
)


def write_random_bits(folder: pathlib.Path, raw: dict, dtype: str) -> pathlib.Path:
    """Write a model whose values are random bits: NaNs of all kinds, infinities, subnormals."""
    models.write_hf(folder, raw, dtype=dtype)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.integers(0, 256, array.nbytes, np.uint8).view(array.dtype).reshape(array.shape)
        for name, array in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def stored_bits(folder: pathlib.Path) -> dict[str, tuple]:
    """Return type, shape and bytes of every tensor in a folder's safetensors files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, array in load_file(path).items():
            assert name not in found
            found[name] = (str(array.dtype), array.shape, array.tobytes())
    return found


def params_bits(folder: pathlib.Path) -> dict[tuple, tuple]:
    leaves = flattened(pretrained.load_params(folder))
    return {
        path: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in leaves.items()
    }


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", models.BY_TENSORS)
def test_a_checkpoint_loads_as_the_folder_it_came_from(tmp_path, name):
    folder = write_random_bits(tmp_path / "hf", models.CASES[name], "bfloat16")
    main([str(folder), str(tmp_path / "checkpoint")])
    assert params_bits(tmp_path / "checkpoint") == params_bits(folder)
    assert pretrained.load_config(tmp_path / "checkpoint") == pretrained.load_config(folder)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("make", "dtype"), spanning([models.llama, models.qwen3], DTYPES))
def test_round_trip_is_exact_to_the_bit(tmp_path, make, dtype):
    folder = write_random_bits(tmp_path / "hf", make(), dtype)
    main([str(folder), str(tmp_path / "checkpoint")])
    main(["--to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "back")])
    assert stored_bits(tmp_path / "back") == stored_bits(folder)
    with safe_open(tmp_path / "back" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_layers_read_one_by_one_are_those_of_the_folder(tmp_path):
    folder = models.write_hf(tmp_path / "hf", models.llama(), dtype="float16")
    main([str(folder), str(tmp_path / "checkpoint")])
    before, after = open_weights(folder), open_weights(tmp_path / "checkpoint")
    assert before.tensors == after.tensors
    for tensor in before.tensors:
        assert after.dtype(tensor) == before.dtype(tensor) == np.float16
        np.testing.assert_array_equal(after.read(tensor), before.read(tensor))


def test_shards_both_ways(tmp_path):
    folder = write_random_bits(tmp_path / "hf", models.llama(), "float32")
    main(["--to-hf", "--max-shard-gb", "2e-5", str(folder), str(tmp_path / "shards")])
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "shards" / file, "np") as opened:
            assert name in opened.keys()  # noqa: SIM118 (not a dict)
    assert index["metadata"]["total_size"] == sum(
        len(b) for _, _, b in stored_bits(folder).values()
    )
    assert stored_bits(tmp_path / "shards") == stored_bits(folder)

    main([str(tmp_path / "shards"), str(tmp_path / "checkpoint")])
    assert params_bits(tmp_path / "checkpoint") == params_bits(folder)
    main(["--to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "back")])
    assert stored_bits(tmp_path / "back") == stored_bits(folder)


@pytest.mark.slow
def test_types_may_be_mixed(tmp_path):
    # Odd numbers of values, so that the order in the file decides what is aligned.
    raw = models.llama(hidden_size=35, intermediate_size=49, head_dim=8)
    folder = write_random_bits(tmp_path / "hf", raw, "float32")
    tensors = load_file(folder / "model.safetensors")
    for i, name in enumerate(tensors):
        if i % 2 and "mlp" in name:
            tensors[name] = tensors[name].view(np.uint16)[:, ::2].copy().view(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    main([str(folder), str(tmp_path / "checkpoint")])
    main(["--to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "back")])
    assert stored_bits(tmp_path / "back") == stored_bits(folder)
    content = (tmp_path / "back" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        aligned = {"BF16": 2, "F32": 4}[entry["dtype"]]
        assert (8 + length + entry["data_offsets"][0]) % aligned == 0


def test_everything_else_is_copied_byte_for_byte(tmp_path):
    folder = models.write_hf(tmp_path / "hf", models.llama())
    (folder / "config.json").write_text(json.dumps(models.llama(), indent=7) + " \n")
    for name, content in (OTHER_FILES | dict.fromkeys(NOT_COPIED, b"x")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    main([str(folder), str(tmp_path / "checkpoint")])
    main(["--to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "back")])
    for made, weights in (
        ("checkpoint", {"params", "duo_jax.json"}),
        ("back", {"model.safetensors"}),
    ):
        files = [path for path in (tmp_path / made).rglob("*") if path.is_file()]
        names = {str(path.relative_to(tmp_path / made)) for path in files}
        names = {"params" if name.startswith("params/") else name for name in names}
        assert names == {"config.json", *OTHER_FILES, *weights}
        for name in ("config.json", *OTHER_FILES):
            assert (tmp_path / made / name).read_bytes() == (folder / name).read_bytes()


def test_odd_things_in_a_folder_are_left_out_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(other_files, "_LARGEST", 1000)
    folder = models.write_hf(tmp_path / "hf", models.llama())
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "gates.tsv").write_text("1.0")
    (folder / "data.txt").write_text("x" * 1001)
    (folder / "images").mkdir()
    for name in ("a.png", "b.png"):
        (folder / "images" / name).write_text("x" * 600)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").touch()
    (folder / "params").mkdir()
    (folder / "params" / "mine.txt").touch()
    (folder / "link.txt").symlink_to(folder / "data.txt")
    (folder / "vocab.json").symlink_to(tmp_path / "elsewhere" / "deep" / "gates.tsv")
    (folder / "circle").symlink_to(folder)
    (folder / "dangling.json").symlink_to(folder / "nowhere")
    (folder / "pattern").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe")
    main([str(folder), str(tmp_path / "out")])
    left_out = "circle, dangling.json, data.txt, images, link.txt and 2 more"
    assert capsys.readouterr().out.splitlines()[-1] == f"not copied: {left_out}"
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {"config.json", "duo_jax.json", "params", "pattern", "vocab.json"}
    assert not (tmp_path / "out" / "params" / "mine.txt").exists()
    assert (tmp_path / "out" / "pattern" / "deep" / "gates.tsv").read_text() == "1.0"
    assert not (tmp_path / "out" / "vocab.json").is_symlink()


def test_a_destination_within_the_model_folder(tmp_path):
    folder = models.write_hf(tmp_path / "hf", models.llama())
    main([str(folder), str(folder / "converted")])
    assert params_bits(folder / "converted") == params_bits(folder)
    main(["--to-hf", str(folder), str(folder / "again")])  # "converted" holds weights
    again = {path.name for path in (folder / "again").iterdir()}
    assert again == {"config.json", "model.safetensors"}


@pytest.mark.slow  # that nothing but names and order changes, the tests above see
@pytest.mark.parametrize("to_hf", [[], ["--to-hf"]], ids=["checkpoint", "hf"])
def test_a_converted_demo_model_evaluates_as_the_original(tmp_path, to_hf):
    main([*to_hf, "demo", str(tmp_path / "converted")])
    results = []
    for model in ("demo", tmp_path / "converted"):
        words = ["--model", str(model), "--workdir", str(tmp_path / f"run-{len(results)}")]
        words += ["--lengths", "320", "--samples", "2", "--batch", "2", "--no-full"]
        passkeys.main(words)
        results.append(json.loads((tmp_path / f"run-{len(results)}" / "passkeys.json").read_text()))
    original, converted = results
    assert converted["rows"] == original["rows"]
    assert np.mean([row["exact"] for row in original["rows"]]) > 0.8
    for key in ("task", "sparsity", "sink", "recent", "retrieval_heads"):
        assert converted[key] == original[key]


@pytest.mark.slow
@pytest.mark.parametrize(("to_hf", "key"), spanning([[], ["--to-hf"]], ["dtype", "torch_dtype"]))
def test_cast(tmp_path, to_hf, key):
    folder = models.write_hf(tmp_path / "hf", models.llama())
    (folder / "config.json").write_text(json.dumps(models.llama() | {key: "float32"}))
    main([*to_hf, "--dtype", "bfloat16", str(folder), str(tmp_path / "out")])
    params = pretrained.load_params(tmp_path / "out")
    expected = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), pretrained.load_params(folder))
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == "bfloat16"
        np.testing.assert_array_equal(ours, theirs)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == models.llama() | {key: "bfloat16"}


def test_a_hub_name(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = cache / "models--org--name"
    folder = models.write_hf(repo / "snapshots" / ("b" * 40), models.llama())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("b" * 40)
    main(["org/name", str(tmp_path / "checkpoint")])
    assert params_bits(tmp_path / "checkpoint") == params_bits(folder)


# --- with PyTorch ---


def transformers_logits(folder: pathlib.Path, raw: dict) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        return model(torch.from_numpy(models.tokens(raw)).long()).logits.float().numpy()


@pytest.mark.one_in(3)
@needs_torch
@pytest.mark.parametrize("name", models.BY_TENSORS)
def test_what_transformers_saves_comes_back_with_the_same_logits(tmp_path, name):
    raw, shards = models.CASES[name], list(models.CASES).index(name) % 2 == 1
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**raw)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if shards else "5GB")
    assert (tmp_path / "hf" / "model.safetensors").exists() != shards

    main([str(tmp_path / "hf"), str(tmp_path / "checkpoint")])
    limit = ["--max-shard-gb", "1e-5"] if shards else []
    main(["--to-hf", *limit, str(tmp_path / "checkpoint"), str(tmp_path / "back")])
    assert stored_bits(tmp_path / "back") == stored_bits(tmp_path / "hf")
    before = transformers_logits(tmp_path / "hf", raw)
    np.testing.assert_array_equal(transformers_logits(tmp_path / "back", raw), before)


@pytest.mark.one_in(3)
@needs_torch
@pytest.mark.parametrize(("shards", "dtype"), spanning([False, True], DTYPES))
def test_pickled_weights_with_the_flag(tmp_path, dtype, shards):
    import torch

    folder = write_random_bits(tmp_path / "hf", models.llama(), dtype)
    expected = params_bits(folder)
    tensors = {
        name: torch.from_numpy(array.view(np.uint8).copy()).view(getattr(torch, dtype))
        for name, array in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    if shards:
        names = sorted(tensors)
        for i in range(2):
            part = {name: tensors[name] for name in names[i::2]}
            torch.save(part, folder / f"pytorch_model-{i}.bin")
        weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        index = json.dumps({"weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    main(["--allow-pickle", str(folder), str(tmp_path / "checkpoint")])
    assert params_bits(tmp_path / "checkpoint") == expected


@needs_torch
def test_pickled_code_is_not_run(tmp_path, capsys):
    import torch

    class Trap:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "sprung",)

    folder = models.write_hf(tmp_path / "hf", models.llama())
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="2"):
        main(["--allow-pickle", str(folder), str(tmp_path / "out")])
    assert "pytorch_model.bin cannot be read as pickled weights" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_without_pytorch_pickled_weights_say_what_to_install(tmp_path, monkeypatch):
    from convert.pickled_files import PickledFiles

    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=r"needs PyTorch: pip install 'duo_jax\[pickle\]'"):
        PickledFiles(tmp_path)

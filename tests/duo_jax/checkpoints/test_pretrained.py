"""Models by name: folders, hub names, parameters, tokenizers, and everything that can be wrong."""

import http.server
import json
import os
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duo_jax.checkpoints import pretrained
from duo_jax.checkpoints.orbax_checkpoint import flattened
from duo_jax.checkpoints.weights import open_weights
from duo_jax.errors import InputError
from duo_jax.model import llama
from tests import models

every_family = pytest.mark.parametrize("raw", models.CASES.values(), ids=models.CASES.keys())
every_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(folder: pathlib.Path) -> pathlib.Path:
    """Split model.safetensors into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit(folder: pathlib.Path, **changes: np.ndarray | None) -> None:
    """Replace tensors of model.safetensors; None takes one out."""
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name: array for name, array in tensors.items() if array is not None}
    save_file(tensors, folder / "model.safetensors")


def write_tokenizer(folder: pathlib.Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def assert_same(ours, theirs) -> None:
    ours, theirs = flattened(ours), flattened(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(theirs[path]).tobytes(), path


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return models.write_hf(tmp_path / "model", models.llama())


@pytest.mark.one_in(4)
@every_family
@every_dtype
def test_tree_is_what_the_model_takes(tmp_path, raw, dtype):
    folder = models.write_hf(tmp_path / "model", raw, dtype=dtype)
    config = pretrained.load_config(folder)
    params = pretrained.load_params(folder)
    key = jax.random.key(0)
    expected = jax.eval_shape(lambda: llama.init_params(config, key, jnp.dtype(dtype)))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)


def test_layers_are_stacked_in_order(tmp_path):
    raw = models.qwen3(num_hidden_layers=11)  # by name, layer 10 comes before layer 2
    params = pretrained.load_params(models.write_hf(tmp_path / "model", raw))
    tensors = models.hf_tensors(raw)
    for layer in range(11):
        up = params["layers"]["mlp"]["up_proj"]["kernel"][layer]
        np.testing.assert_array_equal(up, tensors[f"model.layers.{layer}.mlp.up_proj.weight"].T)
        out = params["layers"]["self_attn"]["o_proj"]["kernel"][layer]
        weight = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
        np.testing.assert_array_equal(out.reshape(4 * 24, 40), weight.T)


def test_large_tensors_are_copied_whole(tmp_path):
    """Large enough for more than one block of the copy, and not a multiple of it."""
    raw = models.llama(vocab_size=70_001, num_hidden_layers=1)
    params = pretrained.load_params(models.write_hf(tmp_path / "model", raw))
    kernel = params["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel, models.hf_tensors(raw)["lm_head.weight"].T)


@every_dtype
def test_shards_equal_a_single_file(tmp_path, dtype):
    single = models.write_hf(tmp_path / "single", models.llama(), dtype=dtype)
    shards = shard(models.write_hf(tmp_path / "shards", models.llama(), dtype=dtype))
    assert_same(pretrained.load_params(single), pretrained.load_params(shards))


def test_layer_by_layer(folder):
    weights = open_weights(folder)
    stacked = flattened(pretrained.load_params(folder))
    for tensor in weights.tensors:
        array = weights.read(tensor)
        leaf = stacked[tensor.path]
        assert weights.dtype(tensor) == array.dtype == np.float32
        np.testing.assert_array_equal(array, leaf if tensor.layer is None else leaf[tensor.layer])


@every_dtype
def test_cast(folder, dtype):
    cast = pretrained.load_params(folder, dtype=dtype)
    as_stored = pretrained.load_params(folder)
    assert_same(cast, jax.tree.map(lambda leaf: leaf.astype(dtype), as_stored))


def test_mixed_types_meet_in_float32_only_where_they_must(folder):
    name = "model.layers.{}.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors |= {n: t.astype(np.float16) for n, t in tensors.items() if "layers" in n}
    tensors[name.format(1)] = tensors[name.format(1)].astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    params = pretrained.load_params(folder)
    assert params["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.float32
    assert params["layers"]["mlp"]["gate_proj"]["kernel"].dtype == jnp.float16
    assert params["norm"]["scale"].dtype == jnp.float32
    up = params["layers"]["mlp"]["up_proj"]["kernel"][0]
    np.testing.assert_array_equal(up, tensors[name.format(0)].T.astype(np.float32))


def test_a_value_beyond_float16_is_refused_not_made_infinite(folder):
    edit(folder, **{"model.norm.weight": np.full(32, 7e4, np.float32)})
    assert pretrained.load_params(folder, dtype="bfloat16")["norm"]["scale"].dtype == jnp.bfloat16
    with pytest.raises(InputError, match=r"model.norm.weight has values beyond the range of float"):
        pretrained.load_params(folder, dtype="float16")


def test_only_what_is_used_is_read(tmp_path):
    """A sparse file of 64 GB: opening it and reading one norm takes neither time nor memory."""
    raw = models.llama(vocab_size=1 << 28)
    folder = models.write_hf(tmp_path / "model", models.llama())
    tensors = load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    header, end = {}, 0
    for name, array in tensors.items():
        shape = [1 << 28, 32] if array.shape == (96, 32) and "mlp" not in name else array.shape
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    weights = open_weights(folder)
    norm = next(tensor for tensor in weights.tensors if tensor.name == "model.norm.weight")
    np.testing.assert_array_equal(weights.read(norm), np.zeros(32))


def break_file(name: str, content: bytes | int | None):
    """Give a file other content, cut it to a length, or remove it."""

    def change(folder: pathlib.Path) -> None:
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, int):
            os.truncate(folder / name, content)
        else:
            (folder / name).write_bytes(content)

    return change


def drop_all_attention(folder: pathlib.Path) -> None:
    names = load_file(folder / "model.safetensors")
    edit(folder, **dict.fromkeys(name for name in names if "self_attn" in name))


def misfit(folder: pathlib.Path) -> None:
    edit(
        folder,
        **{
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.1.mlp.experts.weight": np.zeros(3, np.float32),
            "lm_head.weight": np.zeros((32, 96), np.float32),
            "model.layers.0.input_layernorm.weight": np.zeros(32, np.int8),
        },
    )


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BROKEN = {
    "no weights": (break_file(SINGLE, None), "has no weights: neither model.safetensors nor"),
    "empty file": (break_file(SINGLE, b""), "model.safetensors is not a complete safetensors file"),
    "cut in the header": (break_file(SINGLE, 100), "model.safetensors is not a complete"),
    "cut in the data": (break_file(SINGLE, 30_000), "model.safetensors is not a complete"),
    "not safetensors": (break_file(SINGLE, b"{" * 999), "model.safetensors is not a complete"),
    "git-lfs": (break_file(SINGLE, b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "no config": (break_file("config.json", None), "config.json does not exist"),
    "broken config": (break_file("config.json", b"{"), "config.json is not JSON"),
    "another family": (
        break_file("config.json", b'{"model_type": "gpt2"}'),
        "model type 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3",
    ),
    "many missing": (drop_all_attention, "8 missing: model.layers.0.self_attn.q_proj.weight, "),
    "many missing, cut short": (drop_all_attention, "k_proj.weight,.* and 3 more$"),
    "tensors that do not fit": (
        misfit,
        "do not fit its config.json; "
        "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
        "1 unknown: model.layers.1.mlp.experts.weight; "
        r"1 of another shape: lm_head.weight is \[32, 96\] instead of \[96, 32\]; "
        "1 of another type than BF16, F16, F32: model.layers.0.input_layernorm.weight is I8$",
    ),
}
BROKEN_SHARDS = {
    "missing shard": (break_file(SHARDS[1], None), f"lacks {SHARDS[1]}, listed in {INDEX}"),
    "empty shard": (break_file(SHARDS[0], b""), f"{SHARDS[0]} is not a complete safetensors file"),
    "cut shard": (break_file(SHARDS[1], 20_000), f"{SHARDS[1]} is not a complete safetensors"),
    "broken index": (
        break_file(INDEX, b"{}"),
        f"{INDEX}: object missing required field `weight_map`",
    ),
    "index to elsewhere": (
        break_file(INDEX, b'{"weight_map": {"a": "../model.safetensors"}}'),
        "must name files beside it, not '../model.safetensors'",
    ),
    "index of one shard": (
        break_file(INDEX, json.dumps({"weight_map": {"a": SHARDS[0]}}).encode()),
        "10 missing",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_is_one_clear_line(folder, change, message):
    change(folder)
    with pytest.raises(InputError, match=message) as raised:
        pretrained.load_params(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(("change", "message"), BROKEN_SHARDS.values(), ids=BROKEN_SHARDS.keys())
def test_a_broken_shard_is_one_clear_line(folder, change, message):
    change(shard(folder))
    with pytest.raises(InputError, match=message):
        pretrained.load_params(folder)


def test_pickled_weights_alone_are_refused(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model.bin\).*allow-pick"):
        pretrained.load_params(folder)


def test_tokenizer(folder):
    write_tokenizer(folder)
    assert pretrained.load_tokenizer(folder)("hello world")["input_ids"] == [1, 2]


def test_a_missing_or_broken_tokenizer_is_one_clear_line(folder):
    with pytest.raises(InputError, match="model has no tokenizer"):
        pretrained.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    with pytest.raises(InputError, match=r"tokenizer.json is not JSON: "):
        pretrained.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be loaded: "):
        pretrained.load_tokenizer(folder)


# --- names ---


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> pathlib.Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def write_cached(cache: pathlib.Path, name: str = "org/tiny-llama_1.1") -> pathlib.Path:
    """Lay a model into the cache as huggingface_hub does: snapshot files link to blobs."""
    repo = cache / f"models--{name.replace('/', '--')}"
    written = models.write_hf(cache / "written", models.llama())
    write_tokenizer(written)
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(written.iterdir())):
        shutil.move(file, repo / "blobs" / str(i))
        (snapshot / file.name).symlink_to(pathlib.Path("..", "..", "blobs", str(i)))
    return snapshot


def test_a_folder_is_itself(folder):
    assert pretrained.resolve(folder) == folder
    assert pretrained.resolve(str(folder)) == folder


def test_a_hub_name_is_its_snapshot_in_the_cache(hub_cache, folder):
    snapshot = write_cached(hub_cache)
    found = pretrained.resolve("org/tiny-llama_1.1")
    assert found == snapshot
    assert_same(pretrained.load_params(found), pretrained.load_params(folder))
    assert pretrained.load_tokenizer(found)("world")["input_ids"] == [2]


def test_a_name_that_a_failed_command_left_empty():
    with pytest.raises(InputError, match="the model's name is empty"):
        pretrained.resolve("")


@pytest.mark.parametrize("name", ["nothing", "/no/such/folder", "a/b/c", "a b/c", "../x"])
def test_what_is_neither_folder_nor_hub_name(name):
    with pytest.raises(InputError, match=r"no such model: .*is neither a folder nor a hub name"):
        pretrained.resolve(name)


def test_a_file_is_not_a_model(folder):
    with pytest.raises(InputError, match="is a file; a model is a folder or a hub name"):
        pretrained.resolve(folder / SINGLE)


@pytest.mark.usefixtures("hub_cache")
def test_offline_and_not_in_the_cache():
    with pytest.raises(InputError, match=r"^org/unknown is not a folder here, and cannot be fet"):
        pretrained.resolve("org/unknown")


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "RepoNotFound", "^no such model: org/name is neither a folder here nor a public"),
        (403, "GatedRepo", "^org/name is gated: accept its terms on https://huggingface.co/org/n"),
        (500, "", "^org/name is not a folder here, and cannot be fetched .*500 Internal Server"),
        (None, "", "^org/name is not a folder here, and cannot be fetched .*ConnectError"),
    ],
    ids=["unknown", "gated", "server trouble", "no network"],
)
@pytest.mark.usefixtures("hub_cache")
def test_what_the_hub_refuses(monkeypatch, status, code, message):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        if status is None:
            port = 9  # nobody listens there
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(InputError, match=message) as raised:
            pretrained.resolve("org/name")
        server.shutdown()
    assert "\n" not in str(raised.value)

"""The serving benchmarks count what they say, measure one model in all libraries, and finish."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode, prefill
from benchmarks.serving import floors, random_model, shapes, timing, variants
from benchmarks.serving.rivals import running
from duo_jax import serve
from duo_jax.cache import init_cache
from duo_jax.heads.split import DuoConfig
from kernels import masks
from tests.params import random_params

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
NO_KVPRESS = pathlib.Path("no/such/python")


def small_model(geometry="gqa", layers=2):
    return shapes.model_config(geometry, layers=layers, embed=64, q_heads=8)


@pytest.mark.parametrize(("geometry", "kv_heads", "mlp"), [("gqa", 8, 14336), ("mha", 32, 11008)])
def test_default_shapes_are_those_of_the_published_models(geometry, kv_heads, mlp):
    model = shapes.model_config(geometry, layers=4)
    assert (model.num_q_heads, model.num_kv_heads, model.head_dim) == (32, kv_heads, 128)
    assert (model.embed_size, model.mlp_size) == (4096, mlp)


@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_splits_keep_exactly_the_fraction_and_layers_differ(fraction):
    model = shapes.model_config("mha", layers=4)
    counts = shapes.retrieval_counts(model, 1 - fraction)
    assert sum(counts) == 4 * 32 * fraction
    assert len(set(counts)) > 1


def split(model, counts, sink=3, recent=8):
    return DuoConfig(
        architecture=model, retrieval_counts=counts, sink_size=sink, recent_size=recent
    )


def test_bytes_of_a_step_are_those_of_weights_and_visible_keys():
    model = small_model()
    params = random_params(model)
    table = params.pop("embed_tokens")["embedding"]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + table[0].nbytes

    # 2 KV heads per layer: 1 + 0 of them keep 50 tokens, the others 11.
    count = floors.decode_bytes(split(model, (1, 0)), context=50, dtype="float32")
    assert count["attention"] == (50 + 3 * 11) * 2 * 128 * 4
    assert count["step"] == count["attention"] + weights
    short = floors.decode_bytes(split(model, (1, 0)), context=7, dtype="float32")
    assert short["attention"] == 4 * 7 * 2 * 128 * 4

    tied = dataclasses.replace(model, tie_embeddings=True)
    count = floors.decode_bytes(split(tied, (1, 0)), context=50, dtype="float32")
    # The table takes the place of the projection, and the row that is looked up is one of it.
    assert count["step"] == count["attention"] + weights - table[0].nbytes


@pytest.mark.parametrize("length", [5, 11, 50])
def test_operations_of_prefill_are_those_of_the_visible_pairs(length):
    model = small_model()
    positions = jnp.arange(length)
    full = int(masks.causal(positions, positions).sum())
    streaming = int(masks.streaming(positions, positions, sink_size=3, recent_size=8).sum())
    count = floors.prefill_flops(split(model, (1, 0)), length=length)
    assert count["attention"] == 4 * 128 * 4 * (full + 3 * streaming)  # 4 query heads per KV head
    per_layer = 64 * 128 * (8 + 2 + 2 + 8) + 3 * 64 * model.mlp_size
    last = 2 * 64 * model.vocab_size
    assert count["linear"] == 2 * length * 2 * per_layer
    assert count["all"] == count["attention"] + count["linear"] + last


def test_attention_only_has_the_cache_of_the_model_and_hardly_any_weights():
    model = shapes.model_config("gqa", layers=4)
    only = shapes.attention_only(model)
    counts = [
        floors.decode_bytes(split(m, (8,) * 4, 128, 256), context=1024, dtype="float32")
        for m in (model, only)
    ]
    assert counts[0]["attention"] == counts[1]["attention"]
    assert counts[1]["step"] < 1.015 * counts[1]["attention"]


def test_timing_takes_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = timing.interleaved(calls, rounds=3)
    assert "".join(order) == "ababab"
    assert [len(seconds[name]) for name in "ab"] == [3, 3]
    assert timing.summary([1.0, 5.0, 2.0], scale=10) == {
        "median": 20.0, "low": 15.0, "high": 35.0, "samples": 3,
    }  # fmt: skip


def test_same_seed_gives_the_same_files_and_a_second_call_reuses_them(tmp_path):
    model = small_model()
    first = random_model.ensure_folder(model, tmp_path / "a")
    second = random_model.ensure_folder(model, tmp_path / "b")
    weights = (first / "model.safetensors").read_bytes()
    assert weights == (second / "model.safetensors").read_bytes()
    other = random_model.ensure_folder(model, tmp_path / "b", seed=1)
    assert weights != (other / "model.safetensors").read_bytes()
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert random_model.ensure_folder(model, tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.slow
@needs_torch
def test_folder_is_the_same_model_here_and_in_transformers(tmp_path):
    import torch
    import transformers

    model = small_model()
    folder = random_model.ensure_folder(model, tmp_path)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, 20), np.int32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens).long()).logits[:, -1].numpy()

    (full,) = variants.variants(model, (), sink_size=4, recent_size=4)
    logits, _ = jax.jit(serve.prefill, static_argnums=0)(
        full.config,
        variants.load_params(folder, model),
        init_cache(full.config, batch_size=1, max_len=20),
        jnp.asarray(tokens),
        jnp.array([20]),
    )
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_every_reading_starts_at_the_beginning(tmp_path):
    model = small_model()
    params = variants.load_params(random_model.ensure_folder(model, tmp_path), model)
    _, duo = variants.variants(model, (0.5,), sink_size=4, recent_size=4)
    tokens = np.arange(20, dtype=np.int32)
    reader = variants.Reader(duo.config, params, tokens, chunk=8, mode="exact", dtype="float32")
    reader.read()
    once = [np.array(leaf) for leaf in jax.tree.leaves(reader.cache)]
    reader.read()
    assert reader.cache.lengths.tolist() == [20]
    for first, second in zip(once, jax.tree.leaves(reader.cache), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_smallest_decode_run(tmp_path, capsys):
    config = decode.DecodeFlags(
        contexts=(600,), geometries=("gqa",), layers=1, embed=64, q_heads=32, sink=16, recent=32,
        steps=3, rivals=("kvpress",), kvpress_python=NO_KVPRESS, models=tmp_path / "models",
        out=tmp_path / "decode", tables=("splits",),
    )  # fmt: skip
    decode.main(config)
    result = json.loads((tmp_path / "decode.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["full", "duo 50%", "duo 25%"]
    for row in rows.values():
        assert row["in_place"]
        assert row["cache_bytes"] == pytest.approx(row["cache_bytes_formula"], rel=0.02)
        for of, to in (("speedup", "ms"), ("attention_speedup", "attention_ms")):
            ratio = rows["full"][to]["median"] / row[to]["median"]
            assert row[of] == pytest.approx(ratio)
            assert row[to]["samples"] == 3
    half = rows["duo 50%"]
    assert half["floor_attention_speedup"] == pytest.approx(600 / ((600 + 48) / 2))
    assert 1 < half["floor_step_speedup"] < half["floor_attention_speedup"]
    assert half["cache_bytes"] < 0.6 * rows["full"]["cache_bytes"]
    assert (tmp_path / "decode.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "| gqa | 600 | duo 25% |" in out
    assert "kvpress is skipped: there is no no/such/python" in out


@pytest.mark.slow
def test_smallest_run_of_cache_formats(tmp_path, capsys):
    config = decode.DecodeFlags(
        kv_contexts=(600,), kv=("bf16", "int4"), layers=1, embed=64, q_heads=8, sink=16,
        recent=32, steps=2, models=tmp_path / "models", out=tmp_path / "decode", tables=("kv",),
    )  # fmt: skip
    decode.main(config)
    result = json.loads((tmp_path / "decode_kv.json").read_text())
    rows = {(row["name"], row["kv"]): row for row in result["rows"]}
    duo = [("duo 50%", kv) for kv in ("model", "bf16", "int4")]
    assert list(rows) == [("full", "model"), *duo]
    own = rows["duo 50%", "model"]
    assert own["cache_bytes"] == (606 + 48) * 2 * 128 * 4
    assert rows["duo 50%", "bf16"]["cache_bytes"] == own["cache_bytes"] / 2
    assert rows["duo 50%", "int4"]["cache_bytes"] == own["cache_bytes"] * 68 / 512
    for kv, floor in (("model", 1), ("bf16", 2), ("int4", 512 / 68)):
        row = rows["duo 50%", kv]
        assert row["attention_floor"] == pytest.approx(floor)
        assert row["in_place"]
        assert row["speedup"] == pytest.approx(own["ms"]["median"] / row["ms"]["median"])
        assert row["ms"]["samples"] == 2
    assert rows["full", "model"]["attention_speedup"] == 1
    assert (tmp_path / "decode_kv.png").stat().st_size > 1000
    assert "| gqa | 600 | duo 50% | int4 |" in capsys.readouterr().out
    assert not (tmp_path / "decode.json").exists()


@pytest.mark.slow
def test_smallest_prefill_run(tmp_path, capsys):
    config = prefill.PrefillFlags(
        lengths=(100,), chunk=64, geometries=("mha",), layers=1, embed=64, q_heads=4, sink=4,
        recent=8, rounds=1, rivals=(), models=tmp_path / "models", out=tmp_path / "prefill",
    )  # fmt: skip
    prefill.main(config)
    result = json.loads((tmp_path / "prefill.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["full", "duo 50%", "duo 25%"]
    full, half, _ = result["rows"]
    assert full["cache_bytes"] == 4 * 100 * 2 * 128 * 4
    assert half["cache_bytes"] == 2 * (100 + 12) * 2 * 128 * 4
    assert half["floor_speedup"] > 1
    assert (tmp_path / "prefill.png").stat().st_size > 1000
    assert "| mha | 100 | duo 25% |" in capsys.readouterr().out


@pytest.mark.slow
@needs_torch
def test_transformers_answers_with_times_and_live_bytes(tmp_path):
    model = small_model()
    folder = random_model.ensure_folder(model, tmp_path)
    with running(["transformers"], folder, dtype="float32", kvpress_python=NO_KVPRESS) as (
        libraries,
        skipped,
    ):
        (library,) = libraries
        assert skipped == []
        assert library.versions["torch"]
        for cache in ("DynamicCache", "StaticCache"):
            answer = library.measure("decode", cache=cache, context=30, warmup=1, steps=3)
            assert len(answer["seconds"]) == 3
            assert answer["cache_bytes"] == 2 * 2 * (30 + 4) * 2 * 128 * 4
        assert library.measure("prefill", length=9)["cache_bytes"] == 2 * 2 * 9 * 2 * 128 * 4


def test_library_that_fails_is_skipped_in_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho its first words >&2; echo its last words >&2; exit 3\n")
    python.chmod(0o755)
    with running(["kvpress"], tmp_path, dtype="float32", kvpress_python=python) as (
        libraries,
        skipped,
    ):
        assert libraries == []
    assert skipped == ["kvpress is skipped: kvpress ended with code 3: its last words"]

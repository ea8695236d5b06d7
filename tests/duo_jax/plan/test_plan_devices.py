"""The planner for several GPUs, against what was compiled for them."""

import json
import pathlib

import pytest

from benchmarks import mesh_budgets
from benchmarks.budgets import DUO_4194K
from duo_jax.cache import device_bytes
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh.devices import abstract_mesh
from duo_jax.plan import gpus, verify
from duo_jax.plan.__main__ import main
from duo_jax.plan.estimate import Workload, estimate
from duo_jax.plan.settings import Setting
from tests.duo_jax.plan.test_plan_verify import QUARTER

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "weights", "kv", "context"),
    [
        ("Llama-3-70B, 50%: chunk of 32,000, the last of 3,000,000", "model", "model", 3_000_000),
        (
            "Llama-3-70B, 50%, int8 weights, int4 KV: chunk of 32,000, the last of 13,000,000",
            "int8",
            "int4",
            13_000_000,
        ),
        ("Llama-3-8B, 50%: chunk of 32,000, the last of 9,500,000", "model", "model", 9_500_000),
    ],
)
def test_the_estimate_for_eight_gpus_is_what_was_compiled(name, weights, kv, context):
    results = (ROOT / "benchmarks/results/mesh_budgets.json").read_text(encoding="utf-8")
    peak = json.loads(results)["programs"][name]["peak"]
    workload = Workload(config=mesh_budgets.SERVING[name].config, chunk=32_000, devices=8)
    found = estimate(workload, Setting(duo=True, weights=weights, kv=kv)).parts(context)
    assert found.total == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("kv", ["model", "int4", "int2"])
@pytest.mark.parametrize("context", [1, 512, 513, 1_000_000])
def test_cache_bytes_of_eight_gpus_are_those_that_each_holds(kv, context):
    config, sizes = DUO_4194K, {"batch_size": 2, "dtype": "bfloat16", "kv": kv}
    found = estimate(Workload(config=config, batch_size=2, devices=8), Setting(duo=True, kv=kv))
    parts = found.parts(context)
    held = device_bytes(config, max_len=context, mesh=abstract_mesh(8), **sizes)
    assert parts.full_cache + parts.streaming_cache == held


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "config"), [("Llama-3-8B", DUO_4194K), ("Llama-3-70B", mesh_budgets.DUO_70B)]
)
@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("full caches", Setting(duo=False)),
        ("50%", Setting(duo=True)),
        ("50%, int8 weights, int4 KV", Setting(duo=True, weights="int8", kv="int4")),
        ("50%, int8 weights, int2 KV", Setting(duo=True, weights="int8", kv="int2")),
    ],
)
def test_the_table_of_longest_contexts_is_what_the_planner_finds(name, config, text, setting):
    budget, cells = gpus.find("a100-80g").budget, []
    for devices in (1, 2, 4, 8):
        found = estimate(Workload(config=config, chunk=32_000, devices=devices), setting)
        longest = found.longest(budget)
        cells.append("does not fit" if longest is None else f"{longest:,}")
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    assert f"| {name}, {text} | {' | '.join(cells)} |" in page
    if (name, text) == ("Llama-3-70B", "50%"):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert f"[eight A100-80G](docs/scale.md) fit {cells[-1]} tokens with Llama-3-70B" in readme


@pytest.mark.slow
def test_several_gpus_are_planned_by_name(capsys):
    main(["--devices", "8", "--gpu", "24"])
    printed = capsys.readouterr().out
    assert "8 x a GPU of 24 GB: 24.0 GB of memory each" in printed
    assert "a step also waits for 18 messages between them" in printed
    assert "int2" in printed


def test_a_number_of_gpus_that_cannot_share_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--devices", "3"])
    assert "possible: 1, 2, 4, 8, 16, 32, 64" in capsys.readouterr().err


def test_verify_compiles_for_as_many_gpus_as_are_planned(monkeypatch, capsys):
    devices = []

    def compile_row(found, context, *, target):
        devices.append((found.workload.devices, target))
        return verify.Compiled(decode=1, prefill=found.parts(context).total)

    monkeypatch.setattr(verify, "compile_row", compile_row)
    main(["--devices", "8", "--gpu", "a100-80g", "--kv", "int4", "--verify"])
    assert devices == [(8, "a100"), (8, "a100")]
    assert capsys.readouterr().out.splitlines()[-1].endswith("(+0.00%)")


@pytest.mark.slow
@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.parametrize(
    ("weights", "kv"), [("model", "model"), ("int8", "int4"), ("int8", "int2")]
)
def test_the_estimate_is_what_verify_compiles_for_several_gpus(weights, kv):
    config = DuoConfig(architecture=QUARTER, retrieval_counts=(1, 1))
    workload = Workload(config=config, chunk=8192, devices=2)
    found = estimate(workload, Setting(duo=True, weights=weights, kv=kv))
    longest = found.longest(gpus.find("1").budget)
    peak = verify.compile_row(found, longest, target="a100").peak
    assert found.parts(longest).total == pytest.approx(peak, rel=0.03)

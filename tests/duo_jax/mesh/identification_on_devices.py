"""Identification on a mesh; test_on_devices runs this on eight devices."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import __main__ as convert
from duo_jax.checkpoints import pretrained
from duo_jax.checkpoints.orbax_checkpoint import MARKER_FILE, CheckpointFiles
from duo_jax.errors import InputError
from duo_jax.heads.pattern import load_pattern
from duo_jax.mesh import devices, weights
from duo_jax.model.hf_config import parse_config
from duo_jax.schema import checksums
from tests import models
from tests.params import random_params
from tests.small_demo import small_demo
from train import attribution, budget, masks, optimisation
from train.distillation import Batch
from train.identify import __main__ as command
from train.loss import StepConfig

RAW = models.llama(
    num_key_value_heads=8,
    num_attention_heads=16,
    head_dim=8,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
)
WIDE = RAW | {"hidden_size": 1024, "intermediate_size": 1024}  # groups of int4 lie on a device each
METHODS = {
    "optimise": (optimisation, "distillation", "teacher"),
    "optimise, self": (optimisation, "distillation", "self"),
    "budget": (budget, "divergence", "self"),
    "masks": (masks, "cross_entropy", "self"),
    "attribute": (attribution, "cross_entropy", "self"),
}


def batch() -> Batch:
    tokens = models.tokens(RAW, batch=1, length=48)
    answers = np.zeros((1, 48), bool)
    answers[:, 30:40] = True
    return Batch(
        tokens=jnp.asarray(tokens),
        tail_start=jnp.array([28]),
        total_length=jnp.array([44]),
        answers=jnp.asarray(answers),
    )


@functools.cache
def after_three_steps(method: str, number: int, implementation: str, layers: int):
    config = parse_config(RAW | {"num_hidden_layers": layers})
    module, objective, mixing = METHODS[method]
    step = StepConfig(
        num_steps=8,
        learning_rate=0.02,
        reg_weight=0.05,
        target_sparsity=None if module is optimisation else 0.5,
        sink_size=2,
        recent_size=6,
        mixing=mixing,
        tail_size=20,
        objective=objective,
        implementation=implementation,
    )
    start = {"seed": 0} if module is masks else {}
    state = module.init_state(config, *([] if module is attribution else [step]), **start)
    params = random_params(config)
    mesh = devices.mesh_of(config, number, by_heads=True)
    if mesh is not None:
        params = jax.device_put(params, weights.shardings(mesh, params, stacked=True))
    update = jax.jit(functools.partial(module.train_step, architecture=config, step=step))
    with devices.within(mesh):
        program = jax.make_jaxpr(update)(devices.on_all(state, mesh), params, batch())
        for _ in range(3):
            state, metrics = update(devices.on_all(state, mesh), params, batch())
            state = devices.on_one(state, mesh)
    found = [np.asarray(x) for x in jax.tree.leaves(state) if x.shape == (layers, 8)]
    return found, float(metrics["loss"]), kernel_sizes(program.jaxpr)


def check(method, number, implementation, layers):
    found, loss, _ = after_three_steps(method, number, implementation, layers)
    expected, one_loss, _ = after_three_steps(method, 1, implementation, layers)
    assert found
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)


def test_gates_of_our_kernels_are_those_of_one_device():
    check("optimise", 8, "interpret", layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("number", [2, 8])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_what_one_device_does(method, number, implementation):
    check(method, number, implementation, layers=2)


def test_a_device_computes_only_its_own_heads():
    one, eight = (after_three_steps("optimise", n, "interpret", 1)[2] for n in (1, 8))
    assert len(one) == len(eight) > 0
    for whole, part in zip(one, eight, strict=True):
        assert whole == 8 * part


def kernel_sizes(jaxpr) -> list[int]:
    """Numbers that each kernel of a program is given, of queries, keys and values."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            sizes = (x.aval.size for x in equation.invars if x.aval.ndim >= 3)
            found.append(sum(sizes))
        for inner in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(inner):
                found += kernel_sizes(getattr(inner, "jaxpr", inner))
    return found


def is_program(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_parameters_arrive_in_parts_and_are_the_same(tmp_path):
    folder = models.write_hf(tmp_path / "model", RAW)
    mesh = devices.make_mesh(jax.devices())
    whole = pretrained.load_params(folder)
    parts = pretrained.load_params(folder, mesh=mesh)
    expected = weights.shardings(mesh, whole, stacked=True)
    for one, part, where in zip(*map(jax.tree.leaves, (whole, parts, expected)), strict=True):
        np.testing.assert_array_equal(one, part)
        assert part.sharding.is_equivalent_to(where, part.ndim)


@pytest.mark.parametrize(
    ("stored", "served"),
    [
        ("model", "model"),
        pytest.param("int8", "w8a8", marks=pytest.mark.slow),
        pytest.param("int4", "int4", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_restored_where_it_belongs(tmp_path, monkeypatch, stored, served):
    raw = RAW if stored == "model" else WIDE
    folder, converted = models.write_hf(tmp_path / "model", raw), tmp_path / "converted"
    convert.main([str(folder), str(converted), "--weights", stored])
    heads = np.array([[False, True] * 4, [True] * 3 + [False] * 5])
    mesh = devices.make_mesh(jax.devices())
    whole = pretrained.load_split_params(converted, heads, weights=served)
    stacked = pretrained.load_params(converted) if stored == "model" else None
    monkeypatch.delattr(CheckpointFiles, "read")  # which has all of a tensor on the host
    found = [(whole, pretrained.load_split_params(converted, heads, weights=served, mesh=mesh))]
    if stacked is not None:
        found.append((stacked, pretrained.load_params(converted, mesh=mesh)))
    for expected, params in found:
        places = weights.shardings(mesh, expected, stacked=expected is stacked)
        for one, part, where in zip(*map(jax.tree.leaves, (expected, params, places)), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(part))
            assert part.sharding.is_equivalent_to(where, part.ndim)


def test_damage_is_found_where_a_checkpoint_is_restored(tmp_path):
    folder, converted = models.write_hf(tmp_path / "model", RAW), tmp_path / "converted"
    convert.main([str(folder), str(converted)])
    values, _ = checksums.read_sealed(converted / MARKER_FILE)
    name = "layers/1/mlp/up_proj/kernel"
    values["digests"][name] = "0" * 32
    (converted / MARKER_FILE).write_text(checksums.seal(values) + "\n")
    mesh = devices.make_mesh(jax.devices())
    with pytest.raises(InputError, match=f"is damaged: {name} is not what was written"):
        pretrained.load_params(converted, mesh=mesh)


ARGS = ["--min-length", "200", "--max-length", "256", "--num-lengths", "2", "--num-passkeys", "2"]
ARGS += ["--length-buckets", "1", "--eval-samples", "1", "--eval-random-seeds", "1"]
ARGS += ["--eval-sparsities", "0.5", "--dtype", "float32"]


def identify(folder: pathlib.Path, *words: str) -> np.ndarray:
    command.main([*ARGS, "--workdir", str(folder), *words])
    return load_pattern(folder / "pattern").gates


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["optimise", "budget", "masks", "attribute", "lm", "profile", "reconstruct"]
)
def test_the_command_finds_what_it_finds_on_one_device(tmp_path, method):
    count = "--profile-samples" if method in ("profile", "reconstruct") else "--num-steps"
    words = ["--method", method, count, "3"]
    one = identify(tmp_path / "one", *words, "--devices", "1")
    four = identify(tmp_path / "four", *words, "--devices", "4")
    np.testing.assert_allclose(four, one, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("little_text")
def test_a_run_resumes_on_another_number_of_devices(tmp_path, monkeypatch):
    words = ["--num-steps", "4", "--checkpoint-every", "1", "--eval-samples", "0"]
    words += ["--model", str(small_demo())]
    expected = identify(tmp_path / "whole", *words, "--devices", "4")
    from train import loop

    saved, real = [], loop.WorkDir.save

    def stop_after_two(self, state):
        real(self, state)
        saved.append(int(state.step))
        if len(saved) == 2:
            raise RuntimeError("stopped")

    monkeypatch.setattr(loop.WorkDir, "save", stop_after_two)
    with pytest.raises(RuntimeError, match="stopped"):
        identify(tmp_path / "resumed", *words, "--devices", "4")
    monkeypatch.setattr(loop.WorkDir, "save", real)
    found = identify(tmp_path / "resumed", *words, "--devices", "2")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    lines = (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]

"""Evaluations on a mesh; test_on_devices runs this on eight devices, where all of it is slow."""

import json
import pathlib

import pytest

from duo_jax.evaluate import __main__ as command

TASK = "--num-passkeys 2 --passkey-words 2"
RUNS = {
    "passkeys": f"--lengths 256 --samples 2 --batch 2 --kv int8 {TASK}",
    "perplexity": "--length 256 --samples 1 --sparsities 0.5",
    "compare": f"--length 256 --samples 2 --batch 2 --profile-samples 1 --random-seeds 1 {TASK} "
    "--tasks needle --budgets 0.5 --methods duo H2O KVzip ThinK",
}


def numbers(value) -> list[float]:
    """Return all numbers of a result that are no times."""
    if isinstance(value, dict):
        return [n for key, item in value.items() if "second" not in key for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float) else []


def run(name: str, folder: pathlib.Path, devices: int) -> list[float]:
    words = ["--workdir", str(folder), *RUNS[name].split(), "--devices", str(devices)]
    command.main([name, *words])
    result = json.loads((folder / f"{name}.json").read_text())
    found = numbers(result["rows"])
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation_finds_what_it_finds_on_one_device(tmp_path, name):
    one, eight = (run(name, tmp_path / str(n), n) for n in (1, 8))
    assert eight == pytest.approx(one, abs=1e-3)

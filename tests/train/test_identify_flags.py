"""Flags: presets, the defaults of each method, and what becomes of a flag in a training step."""

import dataclasses
import json

import pytest

from train.identify.flags import IdentifyConfig, default_config
from train.identify.training import step_config
from train.loss import StepConfig


def test_preset_of_the_model_becomes_the_default(tmp_path):
    (tmp_path / "identify.json").write_text(
        json.dumps({"sink": 5, "data": {"num_passkeys": 2}, "eval_sparsities": [0.5]})
    )
    config = default_config("m", tmp_path)
    assert (config.sink, config.recent, config.eval_sparsities) == (5, 256, (0.5,))
    assert (config.data.num_passkeys, config.data.passkey_words) == (2, 32)


def test_the_default_method_is_a_budget_and_the_paper_is_one_flag_away(tmp_path):
    default = default_config("m", tmp_path)
    assert default == IdentifyConfig(model="m")
    assert (default.method, default.resolved().num_steps) == ("budget", 100)
    config = dataclasses.replace(default, method="optimise").resolved()
    assert (config.num_steps, config.learning_rate, config.reg_weight) == (2000, 0.02, 0.05)
    assert (config.sink, config.recent, config.mixing) == (128, 256, "teacher")
    assert (config.dtype, config.data.max_length) == ("bfloat16", 32_000)


def test_a_method_has_defaults_of_its_own_beside_what_was_chosen(tmp_path):
    """A preset that names a method leaves the others as they are."""
    (tmp_path / "identify.json").write_text(json.dumps({"method": "budget", "num_steps": 7}))
    preset = default_config("m", tmp_path)
    budget = preset.resolved()
    assert (budget.num_steps, budget.learning_rate, budget.mixing) == (7, 0.7, "self")
    assert budget.target_sparsity == 0.75
    credits = dataclasses.replace(preset, method="attribute").resolved()
    assert (credits.num_steps, credits.target_sparsity, credits.learning_rate) == (7, 0.75, None)
    papers = dataclasses.replace(preset, method="optimise", learning_rate=0.01).resolved()
    assert (papers.num_steps, papers.learning_rate, papers.mixing) == (7, 0.01, "teacher")
    assert papers.target_sparsity is None
    chosen = dataclasses.replace(preset, mixing="teacher", target_sparsity=0.5).resolved()
    assert (chosen.mixing, chosen.target_sparsity) == ("teacher", 0.5)


PAPERS = {"method": "optimise"}
# By the field of StepConfig that they change; tests/train/test_optimisation.py sees that each field
# changes the gates.
STEP_FLAGS = {
    "num_steps": {"num_steps": 7},
    "learning_rate": {"learning_rate": 0.05},
    "reg_weight": {"reg_weight": 2.0},
    "target_sparsity": {"target_sparsity": 0.9},
    "sink_size": {"sink": 1},
    "recent_size": {"recent": 3},
    "mixing": {"mixing": "self"},
    "objective": {"method": "lm"},
    "votes": {"votes": "equal"},
    "implementation": {"implementation": "interpret"},
}


@pytest.mark.parametrize("field", STEP_FLAGS)
def test_a_flag_changes_its_field_of_the_step(field):
    before, after = (
        dataclasses.asdict(step_config(IdentifyConfig(**PAPERS | changes), tail_size=8))
        for changes in ({}, STEP_FLAGS[field])
    )
    assert {name for name in before if before[name] != after[name]} == {field}


def test_every_field_of_a_step_has_its_flag():
    fields = {field.name for field in dataclasses.fields(StepConfig)}
    assert fields - STEP_FLAGS.keys() == {"tail_size"}  # which the samples decide

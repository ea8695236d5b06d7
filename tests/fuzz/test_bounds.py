"""Counts and texts of presets, flags and Python: what would be listed has a bound everywhere."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from duo_jax.cli import presets
from duo_jax.data.passkey_templates import ORDINALS, PasskeyTemplates
from duo_jax.data.passkeys import PasskeyConfig, PasskeySampler
from duo_jax.errors import InputError
from duo_jax.evaluate.compare.command import CompareConfig
from duo_jax.evaluate.compare.command import main as compare
from duo_jax.evaluate.frontier.command import main as frontier
from duo_jax.evaluate.frontier.settings import FrontierConfig
from duo_jax.evaluate.needle.command import NeedleConfig
from duo_jax.evaluate.needle.command import main as needle
from duo_jax.evaluate.needle.documents import Haystack, NeedleTemplates
from duo_jax.evaluate.passkeys.command import PasskeysConfig
from duo_jax.evaluate.passkeys.command import main as passkeys
from duo_jax.session.tokenization import load_tokenization
from tests.fuzz.contract import REFUSED, attempt
from tests.fuzz.seeds import DEMO
from train.demo_model.flags import DemoConfig
from train.identify.__main__ import main as identify
from train.identify.flags import IdentifyConfig

_FEW, _MANY = 1_000, 10_000
_LONGEST_TEMPLATE = 20_000
_LARGEST = 2**31 - 1
_GRID = {"num_lengths": _FEW, "samples": _MANY, "batch": _FEW}
_BOUNDS = {
    IdentifyConfig: {
        "profile_samples": _MANY,
        "length_buckets": _FEW,
        "eval_samples": _MANY,
        "eval_random_seeds": _FEW,
        "data.num_lengths": _MANY,
        "data.passkey_words": _MANY,
    },
    NeedleConfig: {**_GRID, "num_depths": _FEW, "needle.answer_words": _MANY},
    PasskeysConfig: {**_GRID, "data.passkey_words": _MANY},
    CompareConfig: {
        "samples": _MANY,
        "batch": _FEW,
        "random_seeds": _FEW,
        "profile_samples": _MANY,
        "data.passkey_words": _MANY,
    },
    FrontierConfig: {"samples": _MANY, "batch": _FEW, "data.passkey_words": _MANY},
    DemoConfig: {"test_samples": _MANY},
}
_CASES = [(kind, name, most) for kind, bounds in _BOUNDS.items() for name, most in bounds.items()]
_COMMANDS = {
    IdentifyConfig: (identify, "identify.json", None),
    NeedleConfig: (needle, "evaluate.json", "needle"),
    PasskeysConfig: (passkeys, "evaluate.json", "passkeys"),
    CompareConfig: (compare, "evaluate.json", "compare"),
    FrontierConfig: (frontier, "evaluate.json", "frontier"),
}
_TOO_MANY = {
    "texts": (NeedleConfig, {"samples": _MANY, "num_lengths": 11}, "at most 1,000 lengths"),
    "lengths": (PasskeysConfig, {"lengths": range(1, 1_002)}, "at most 1,000 lengths"),
    "depths": (NeedleConfig, {"depths": np.linspace(0, 1, 1_001).tolist()}, "as many depths"),
    "rows": (
        IdentifyConfig,
        {"eval_random_seeds": _FEW, "eval_sparsities": np.linspace(0, 1, 10).tolist()},
        "10,000 rows",
    ),
}


def _refuse(capsys, kind, values, folder, words):
    """Expect one line from a preset and from the flag; `values` has one item."""
    command, file, part = _COMMANDS[kind]
    (folder / file).write_text(json.dumps(values if part is None else {part: values}))
    with pytest.raises(InputError) as refusal:
        presets.load(kind(model="m"), folder / file, part=part)
    assert len(str(refusal.value)) < 1_000
    assert words in str(refusal.value)
    (name, value), *_ = values.items()
    if isinstance(value, dict):
        ((name, value),) = value.items()
    flag = "--" + name.replace("_", "-")
    if len(str(value)) < 100_000:  # the system's own limit is 128 KiB
        with pytest.raises(SystemExit) as exit_:
            command([flag, str(value)])
        assert exit_.value.code == 2
        line = capsys.readouterr().err
        assert len(line.splitlines()) == 1
        assert "at most" in line or " to " in line


@pytest.mark.parametrize(("kind", "name", "most"), _CASES)
def test_a_count_has_a_bound(kind, name, most, tmp_path, capsys):
    *group, field = name.split(".")
    for value in (most + 1, _LARGEST):
        start = kind()
        inner = getattr(start, group[0]) if group else start
        with pytest.raises(InputError, match=rf"{field} {value} is not .* to {most:,}$"):
            dataclasses.replace(inner, **{field: value})
    values = {group[0]: {field: _LARGEST}} if group else {field: _LARGEST}
    if kind in _COMMANDS:
        _refuse(capsys, kind, values, tmp_path, str(most))


@pytest.mark.parametrize("case", _TOO_MANY)
def test_a_product_has_a_bound(case, tmp_path):
    kind, values, words = _TOO_MANY[case]
    given = {name: v if isinstance(v, int) else tuple(v) for name, v in values.items()}
    with pytest.raises(InputError, match=words):
        kind(**given)
    command, file, part = _COMMANDS[kind]
    del command
    values = {name: v if isinstance(v, int) else [*v] for name, v in values.items()}
    (tmp_path / file).write_text(json.dumps(values if part is None else {part: values}))
    with pytest.raises(InputError, match=words):
        presets.load(kind(model="m"), tmp_path / file, part=part)


@pytest.mark.parametrize("kind", [PasskeyTemplates, NeedleTemplates])
def test_a_template_has_a_bound(kind, tmp_path, capsys):
    named = {field.name: "{passkey}{answer}" for field in dataclasses.fields(kind)}
    for name in named.keys() - {"num_passkeys", "passkey_words", "answer_words", "words"}:
        long = named[name] + "a" * _LONGEST_TEMPLATE
        with pytest.raises(InputError, match="not a text of at most 20,000 characters"):
            kind(**{name: long})
        owner, group = (
            (NeedleConfig, "needle") if kind is NeedleTemplates else (IdentifyConfig, "data")
        )
        _refuse(capsys, owner, {group: {name: long}}, tmp_path, "20000")


def test_filled_templates_have_a_bound():
    with pytest.raises(InputError, match="have 110,000 words together; at most 100,000"):
        NeedleTemplates(answer="{words} " * 11, answer_words=_MANY)
    with pytest.raises(InputError, match="have 200,000 words together; at most 100,000"):
        PasskeyTemplates(num_passkeys=20, passkey_words=_MANY)


@pytest.fixture(scope="module")
def tokenization():
    return load_tokenization(pathlib.Path(DEMO))


def test_the_largest_passkeys_are_refused_for_their_length_at_once(tokenization):
    long = "a b" * (_LONGEST_TEMPLATE // 3)
    config = PasskeyConfig(
        num_passkeys=len(ORDINALS),
        passkey_words=5_000,
        max_length=_LARGEST,
        needle="{passkey}" + long[9:],
        **dict.fromkeys(("intro", "closing", "question", "separator"), long),
    )
    made = attempt(lambda: PasskeySampler(config, tokenization.tokenizer, ["Text."], seed=0))
    assert made is REFUSED


def test_the_largest_needle_is_refused_for_its_length_at_once(tokenization):
    templates = NeedleTemplates(answer="{words} " * 10, answer_words=_MANY)
    haystack = Haystack(templates, tokenization, ["Some text."], seed=0)
    made = attempt(lambda: haystack.document(length=1_000, depth=0.5))
    assert made is REFUSED

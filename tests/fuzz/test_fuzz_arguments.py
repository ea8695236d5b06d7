"""Arguments of the Python interface: of another type, out of range, or used as they are."""

import dataclasses
import decimal
import json
import pathlib
import types

import huggingface_hub  # noqa: F401  # here, as it takes seconds to import
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import duo_jax
from duo_jax import api
from duo_jax.checkpoints import pretrained
from duo_jax.model.config import ModelConfig, RopeConfig
from duo_jax.model.hf_config import parse_config
from duo_jax.session.tokenization import Tokenization, check_variables
from tests import models
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import LONG

_ARCHITECTURE = parse_config(models.llama())
_GATES = np.array([[1.0, 0.0], [0.2, 0.9]])
_PATTERN = duo_jax.Pattern(gates=_GATES, sink_size=4, recent_size=8)
_VALID = {
    duo_jax.SamplingConfig: {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
    duo_jax.DuoConfig: {
        "architecture": _ARCHITECTURE,
        "retrieval_counts": (1, 2),
        "sink_size": 4,
        "recent_size": 8,
    },
    duo_jax.Pattern: {"gates": _GATES, "sink_size": 4, "recent_size": 8, "extra": {"a": 1}},
    ModelConfig: {
        field.name: getattr(_ARCHITECTURE, field.name) for field in dataclasses.fields(ModelConfig)
    },
    RopeConfig: {"kind": "yarn", "theta": 1e4, "factor": 4.0, "original_max_positions": 32},
}
_LOAD = {
    "pattern": _PATTERN,
    "sparsity": 0.5,
    "threshold": None,
    "sink_size": 4,
    "recent_size": 8,
    "dtype": None,
    "weights": "model",
    "kv": "model",
    "prefill_chunk": 64,
    "prefill_mode": "exact",
    "implementation": "auto",
}
_KNOWN = "model int8 int4 int2 bf16 w8a8 chunk exact xla triton interpret float32 none yarn llama3"
_HOSTILE = [
    *[None, True, False, 0, 1, -1, 2**31 - 1, 2**31, 2**63, 10**400, 1 << 200_000, 0.5, 1.5, 0.0],
    *[float("nan"), float("inf"), -float("inf"), 5e-324, 1e39, 1e308, 1j, decimal.Decimal(1)],
    *["", "x", "\ud800", "\0", "a\nb", "x" * 300, "x" * LONG, b"x", b"\xff" * LONG],
    *[(), [], {}, set(), (1,), [1, 2], (1.0, 2), (True, 1), [None] * 2_000, {"a": 1}, {1: 2}],
    *[object(), object, len, pathlib.Path("x"), pathlib.Path("/"), range(3), slice(1)],
    *[np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("x"), np.int8(-1)],
    *[np.ones((2, 2)), np.ones(0), np.ones((2, 2, 2)), np.array("x"), np.array(None), np.array(0)],
    *[np.full((2, 2), np.nan), np.ones((2, 2), complex), np.ones((2, 2), int), np.dtype("int8")],
    *[_PATTERN, _ARCHITECTURE, "bfloat16", jnp.float16, [[1.0, 0.0], [0.5]], [[1.0, 0.0]] * 2],
    *_KNOWN.split(),
]


@st.composite
def _arguments(draw: st.DrawFn, valid: dict) -> dict:
    names = draw(st.lists(st.sampled_from([*valid]), min_size=1, max_size=2, unique=True))
    values = st.one_of(
        st.sampled_from(_HOSTILE), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=10)
    )
    return valid | {name: draw(values) for name in names}


@fuzzed(
    st.sampled_from([*_VALID]).flatmap(
        lambda kind: st.tuples(st.just(kind), _arguments(_VALID[kind]))
    )
)
def test_a_dataclass_holds_what_it_was_given_or_refuses_it(case, folder):
    del folder
    kind, given = case
    made = attempt(lambda: kind(**given))
    if made is not REFUSED:
        for name, value in given.items():
            found = getattr(made, name)
            assert found is value or np.array_equal(found, np.asarray(value).tolist())
            assert not isinstance(value, float) or np.isfinite(value)


def _patched_load(**given):
    """Load without tokenizer and weights."""
    params = {"norm": {"scale": jnp.ones(4)}}
    with pytest.MonkeyPatch.context() as patch:
        tokenization = Tokenization(tokenizer=None, stop_tokens=())
        patch.setattr(api, "load_tokenization", lambda _: tokenization)
        opened = types.SimpleNamespace(architecture=_ARCHITECTURE)
        patch.setattr(api, "open_weights", lambda _: opened)
        patch.setattr(pretrained, "load_split_params", lambda *_, **__: params)
        return duo_jax.load(**given)


@fuzzed(_arguments(_LOAD))
def test_load_uses_an_argument_or_refuses_it(given, folder):
    loaded = attempt(lambda: _patched_load(model=folder, **given))
    if loaded is not REFUSED:
        for name in ("sink_size", "recent_size"):
            assert given[name] is None or getattr(loaded.config, name) == given[name]
        for name in ("prefill_chunk", "prefill_mode", "implementation"):
            assert getattr(loaded.runtime, name) == given[name]


@fuzzed(st.sampled_from(_HOSTILE) | st.text(max_size=300))
def test_a_model_is_a_folder_or_refused(given, folder):
    del folder
    if not isinstance(given, str) or given != pretrained.DEMO:
        assert attempt(lambda: duo_jax.load(given)) is REFUSED


_VALUES = st.sampled_from(_HOSTILE) | st.text(max_size=10) | st.floats()


@fuzzed(_VALUES | st.dictionaries(st.sampled_from(["a", "messages", 1, "\ud800"]), _VALUES))
def test_variables_of_a_chat_template_are_json_or_refused(given, folder):
    del folder
    found = attempt(lambda: check_variables(given))
    if found is not REFUSED:
        assert found == (given or {})
        assert json.loads(json.dumps(found, allow_nan=False)) == found


_GATES_OF_ANY_SHAPE = st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 8, 40_000])).map(np.ones)


@fuzzed(
    st.fixed_dictionaries(
        {
            "gates": _GATES_OF_ANY_SHAPE,
            "sink_size": st.sampled_from([0, 2**31 - 1]),
            "recent_size": st.just(1),
            "extra": st.dictionaries(st.sampled_from(["a", "sink_size", 1, "\ud800"]), _VALUES),
        }
    )
)
def test_a_pattern_that_is_made_can_be_saved_and_read_again(given, folder):
    made = attempt(lambda: duo_jax.Pattern(**given))
    if made is not REFUSED:
        assert attempt(lambda: duo_jax.save_pattern(made, folder / "pattern")) is not REFUSED
        found = attempt(lambda: duo_jax.load_pattern(folder / "pattern"))
        assert found is not REFUSED
        assert np.array_equal(found.gates, made.gates)
        assert found.extra == json.loads(json.dumps(given["extra"]))

"""The JSON files of a model folder: config.json and generation settings."""

import json

import jax.numpy as jnp
import numpy as np
import transformers

from duo_jax.model import rope
from duo_jax.model.config import FAMILIES
from duo_jax.model.hf_config import read_config
from duo_jax.session.tokenization import _eos_tokens
from tests import models
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import json_files
from tests.fuzz.seeds import of_cases

_TRANSFORMERS_4 = models.llama(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
del _TRANSFORMERS_4["rope_parameters"]
_CONFIGS = [json.dumps(raw) for raw in (*models.CASES.values(), _TRANSFORMERS_4)]
# Our name of a number, and transformers'.
_SIZES = {
    "vocab_size": "vocab_size",
    "embed_size": "hidden_size",
    "mlp_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_q_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}


def check_numbers(architecture, raw):
    """Compare with transformers' own class, where it accepts the file too."""
    try:
        theirs = getattr(transformers, FAMILIES[raw["model_type"]].replace("ForCausalLM", "Config"))
        theirs = theirs(**raw)
    except Exception:  # its checks raise errors of many kinds
        return
    for ours, name in _SIZES.items():
        assert getattr(architecture, ours) == getattr(theirs, name), name


def check_rope(architecture):
    """Look at the rotary embedding of the first, middle and last positions."""
    last = architecture.max_positions - 1
    for total_length in (1, architecture.max_positions):
        positions = jnp.array([[0, last // 2, last]], jnp.int32)
        tables = rope.rotation(architecture, positions, total_length=total_length)
        assert all(np.isfinite(np.asarray(table)).all() for table in tables)


@fuzzed(json_files([*_CONFIGS, *of_cases("config-*/config.json")]))
def test_a_config_means_what_transformers_says_and_turns_finitely(content, folder):
    file = folder / "config.json"
    file.write_bytes(content)
    architecture = attempt(lambda: read_config(file), size=len(content))
    if architecture is not REFUSED:
        check_numbers(architecture, json.loads(content))
        attempt(lambda: check_rope(architecture))


@fuzzed(json_files(['{"eos_token_id": [1, 2], "bos_token_id": 0}', '{"eos_token_id": 7}']))
def test_tokens_that_end_an_answer_are_those_of_the_file(content, folder):
    file = folder / "generation_config.json"
    file.write_bytes(content)
    found = attempt(lambda: _eos_tokens(file), size=len(content))
    if found is not REFUSED:
        theirs = json.loads(content).get("eos_token_id")
        assert found == ([] if theirs is None else np.atleast_1d(theirs).tolist())

"""Greedy text against transformers' `generate`, on tiny random models of every family in float32.

Our tokens are compared with greedy.npz, and that file with transformers itself where torch is
installed. transformers reads every prompt by itself in one go; we read all of them in one ragged
batch, in chunks, and with "dynamic" rope both stretch the rope as the text grows.
"""

import functools
import importlib.util

import numpy as np
import pytest

import duo_jax
from duo_jax.checkpoints import pretrained
from duo_jax.heads.pattern import Pattern
from duo_jax.heads.split import duo_config
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from tests import models
from tests.golden import generate

pytestmark = pytest.mark.core
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
ROUNDING = 1e-4  # ten times what the logits of test_parity.py may differ by, which are about 1


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(generate.GREEDY_FILE) as file:
        return dict(file)


def runtime(folder, heads, *, recent=16) -> Runtime:
    config = pretrained.load_config(folder)
    return Runtime(
        config=duo_config(config, heads, sink_size=4, recent_size=recent),
        params=pretrained.load_split_params(folder, heads),
        prefill_chunk=16,
    )


def write(runtime: Runtime, prompts: list[list[int]], **settings) -> np.ndarray:
    session = Session(runtime, batch_size=len(prompts))
    session.append(prompts)
    new = session.decode(max_new_tokens=generate.NEW_TOKENS, **settings)
    return np.concatenate([np.array(part) for part in new], axis=1)


def all_heads(raw: dict) -> np.ndarray:
    return np.ones((raw["num_hidden_layers"], raw["num_key_value_heads"]), bool)


@pytest.mark.parametrize("name", models.CASES)
def test_no_choice_hangs_on_rounding(name):
    assert golden()[f"{name}/lead"] > ROUNDING


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", models.BY_SERVING)
def test_all_retrieval_equals_transformers(tmp_path, name):
    raw = models.CASES[name]
    plain = runtime(models.write_hf(tmp_path, raw), all_heads(raw))
    assert write(plain, generate.prompts(raw)).tolist() == golden()[f"{name}/plain"].tolist()


@pytest.mark.slow  # test_unusual_sizes in test_serve.py compares the logits
def test_streaming_heads_with_room_for_everything_equal_transformers(tmp_path):
    name = "llama, dynamic rope"
    raw = models.CASES[name]
    heads = all_heads(raw)
    heads[0, 1] = heads[1] = False
    room = models.LENGTH + generate.NEW_TOKENS
    split = runtime(models.write_hf(tmp_path, raw), heads, recent=room)
    assert write(split, generate.prompts(raw)).tolist() == golden()[f"{name}/plain"].tolist()


@pytest.mark.slow
def test_repetition_penalty_equals_transformers(tmp_path):
    name = "llama-3, grouped queries"
    raw = models.CASES[name]
    plain = runtime(models.write_hf(tmp_path, raw), all_heads(raw))
    sampling = SamplingConfig(repetition_penalty=generate.PENALTY)
    written = write(plain, generate.prompts(raw)[-1:], sampling=sampling)
    assert written.tolist() == golden()[f"{name}/penalty"].tolist()
    assert written.tolist() != golden()[f"{name}/plain"][-1:].tolist()


@needs_torch
@pytest.mark.parametrize("name", models.BY_SERVING)
def test_the_golden_file_is_what_transformers_writes(tmp_path, name):
    raw = models.CASES[name]
    theirs = generate.transformers_greedy(models.write_hf(tmp_path, raw), raw)
    assert theirs["plain"].tolist() == golden()[f"{name}/plain"].tolist()
    assert theirs["penalty"].tolist() == golden()[f"{name}/penalty"].tolist()


@needs_torch
def test_texts_equal_those_of_transformers(tmp_path):
    """Text to text: tokenizer, prompt, end-of-text tokens, and the split that `load` chooses."""
    import torch
    from transformers import AutoModelForCausalLM

    raw = models.llama(vocab_size=400, num_hidden_layers=1)
    folder = models.write_tokenizer(models.write_hf(tmp_path, raw), vocab_size=400)
    model = duo_jax.load(folder, pattern="none", prefill_chunk=16)
    prompts = ["Take note: the passkey is", "alpha bravo charlie delta echo foxtrot golf hotel"]
    # An ordinary token of the first text takes the part of the end-of-text token.
    [free] = model.generate(prompts[:1], max_new_tokens=24)
    session = Session(model.runtime)
    session.append([model.tokenizer(prompts[0])["input_ids"]])
    tokens = [token for [new] in session.decode(max_new_tokens=24) for token in new]
    stop = next(token for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [1, {stop}]}}')

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = []
    for prompt in prompts:
        inputs = model.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = theirs.generate(**inputs, do_sample=False, max_new_tokens=24, pad_token_id=0)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert len(new) < 24 or prompt != prompts[0]
        new = new[:-1] if new[-1] in (1, stop) else new
        expected.append(model.tokenizer.decode(new, skip_special_tokens=True))
    gates = Pattern(gates=np.zeros((1, 2)), sink_size=128, recent_size=256)
    for pattern in ("none", gates):
        settings = {} if pattern == "none" else {"sparsity": 0.0}
        model = duo_jax.load(folder, pattern=pattern, prefill_chunk=16, **settings)
        assert model.generate(prompts, max_new_tokens=24) == expected
    assert free.startswith(expected[0])
    assert free != expected[0]

"""Sessions whose retrieval heads keep a part of what was read."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest

import duo_jax
from duo_jax import cache as caches
from duo_jax.cache import LATEST, cache_bytes
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkeys import PasskeyConfig, PasskeySampler
from duo_jax.errors import InputError
from duo_jax.evaluate import __main__ as evaluate
from duo_jax.evaluate.passkeys import retrieval
from duo_jax.heads.reconstruction import Instruction
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.session import cache_files
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from tests import models
from tests.params import random_params

RAW = models.llama(
    num_key_value_heads=4, num_attention_heads=4, num_hidden_layers=1, max_position_embeddings=2048
)
CONFIG = parse_config(RAW)
HEADS = np.array([[0, 1, 0, 1]], bool)
INSTRUCTION = Instruction(whole=(1, 2), part=(3,), begin=(4,))


@functools.cache
def runtime(keep=0.5, **settings):
    params = random_params(CONFIG)
    params["lm_head"]["kernel"] = 5 * params["lm_head"]["kernel"]
    return Runtime(
        config=duo_config(CONFIG, HEADS, sink_size=4, recent_size=8),
        params=split_params(CONFIG, params, HEADS),
        prefill_chunk=128,
        keep=keep,
        **settings,
    )


def prompt(length, seed=0):
    return models.tokens(RAW, batch=1, length=length, seed=seed)[0].tolist()


def write(session, count=4):
    rows = [[] for _ in session.tokens]
    for new in session.decode(max_new_tokens=count):
        for row, tokens in zip(rows, new, strict=True):
            row.extend(tokens)
    return rows


def kept(session):
    return np.asarray(session.cache.kept).tolist()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("keep_by", ["snapkv", "kvzip"])
def test_each_turn_keeps_a_part_of_what_was_read(keep_by):
    session = Session(runtime(keep_by=keep_by, instruction=INSTRUCTION))
    session.append([prompt(300)])
    assert kept(session) == [300]  # the question may still come
    write(session)  # the last token that is written is not in the cache yet
    assert kept(session) == [150 + 3]
    session.append([prompt(95, seed=1)])
    write(session)
    assert kept(session) == [200 + 3]
    assert np.asarray(session.cache.lengths).tolist() == [304 + 95 + 3]


@pytest.mark.slow
def test_bytes_are_freed():
    session = Session(runtime(), max_len=2000)
    session.append([prompt(1500)])
    before = session.cache.nbytes
    write(session)
    config = session.runtime.config
    sizes = {"batch_size": 1, "dtype": np.float32, "votes": True}
    assert before == cache_bytes(config, max_len=1536, **sizes)
    assert session.cache.nbytes == cache_bytes(config, max_len=768, **sizes)
    assert session.capacity >= len(session.tokens[0])
    assert session.whole_slots == 1536  # what the bytes are compared with


@pytest.mark.slow
def test_a_short_text_keeps_all_and_reads_as_without():
    sessions = [Session(runtime(keep)) for keep in (0.01, 1.0)]
    for session in sessions:
        session.append([prompt(LATEST)])
    few, all_tokens = (write(session, 8) for session in sessions)
    assert few == all_tokens
    assert kept(sessions[0]) == [LATEST + 7]


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others():
    prompts = [prompt(300), prompt(140, seed=1), prompt(40, seed=2)]
    together = Session(runtime(), batch_size=3)
    together.append(prompts)
    rows = write(together)
    for row, tokens in zip(rows, prompts, strict=True):
        alone = Session(runtime())
        alone.append([tokens])
        assert write(alone) == [row]


def test_an_unfinished_end_does_not_change_what_is_kept_much():
    """A chunk that ends in few tokens leaves the votes of those before it."""
    session = Session(runtime())
    session.append([prompt(128)])
    session.append([prompt(1, seed=3)])
    write(session)
    assert kept(session) == [65 + 3]


@pytest.mark.slow
def test_an_interrupt_while_the_text_is_repeated_costs_the_cache_only(monkeypatch):
    session = Session(runtime(keep_by="kvzip", instruction=INSTRUCTION))
    session.append([prompt(300)])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(caches, "rewind", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(session)
    monkeypatch.undo()
    assert session.cache is None
    fresh = Session(runtime(keep_by="kvzip", instruction=INSTRUCTION))
    fresh.append([prompt(300)])
    assert write(session) == write(fresh)


@pytest.mark.parametrize("kv", ["model", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_saved_cache_goes_on_bit_for_bit(tmp_path, kv):
    session = Session(runtime(kv_format=kv))
    session.append([prompt(300)])
    write(session)
    cache_files.save(session, tmp_path / "saved", extra={})
    loaded = Session(runtime(kv_format=kv))
    cache_files.load(loaded, tmp_path / "saved")
    assert loaded.cache.nbytes == session.cache.nbytes
    assert write(loaded, 6) == write(session, 6)
    assert kept(loaded) == kept(session)


def test_a_saved_cache_belongs_to_its_settings(tmp_path):
    session = Session(runtime())
    session.append([prompt(100)])
    write(session)
    cache_files.save(session, tmp_path / "saved", extra={})
    for other in (runtime(0.25), runtime(1.0)):
        with pytest.raises(InputError, match=r"another fraction of tokens to keep \(0.5, here"):
            cache_files.load(Session(other), tmp_path / "saved")


def test_another_text_is_read_again():
    session = Session(runtime())
    session.append([prompt(300)])
    write(session)
    session.replace([prompt(200)])
    assert kept(session) == [200]
    fresh = Session(runtime())
    fresh.append([prompt(200)])
    assert write(session) == write(fresh)


@pytest.mark.slow
def test_a_short_row_does_not_hide_that_another_was_evicted():
    """It keeps all of its tokens, and the other cannot go back."""
    config = duo_config(CONFIG, np.ones_like(HEADS), sink_size=4, recent_size=8)
    all_full = dataclasses.replace(runtime(), config=config)
    session = Session(all_full, batch_size=2)
    session.append([prompt(300), prompt(20, seed=1)])
    write(session, 1)
    assert session.cache.kept.tolist()[0] < 300
    rows = [prompt(250), prompt(10, seed=1)]
    session.replace([*map(list, rows)])
    fresh = Session(all_full, batch_size=2)
    fresh.append(rows)
    assert write(session) == write(fresh)


@pytest.mark.usefixtures("unhooked")
def test_what_cannot_be_is_refused():
    for keep in (0, -0.5, 1.5, float("nan"), "half"):
        with pytest.raises(InputError, match=r"^keep "):
            runtime(keep)
    with pytest.raises(InputError, match="int2"):
        runtime(kv_format="int2")
    with pytest.raises(InputError, match="keep_by"):
        runtime(keep_by="h2o")
    with pytest.raises(InputError, match="needs an instruction"):
        runtime(keep_by="kvzip")


def test_a_text_that_fills_the_range_cannot_be_repeated():
    short = dataclasses.replace(CONFIG, max_positions=320)
    whole = runtime(keep_by="kvzip", instruction=INSTRUCTION)
    config = dataclasses.replace(whole.config, architecture=short)
    session = Session(dataclasses.replace(whole, config=config))
    session.append([prompt(300)])
    with pytest.raises(InputError, match="leave too little of the model's range"):
        write(session)


@pytest.fixture(scope="module")
def demo_samples():
    model = duo_jax.load("demo")
    settings = json.loads(
        (pathlib.Path(duo_jax.__file__).parent / "demo/evaluate.json").read_text()
    )
    data = PasskeyConfig(**settings["passkeys"]["data"], min_length=1, max_length=768)
    _, held_out = split_held_out(load_documents(()))
    sampler = PasskeySampler(data, model.tokenizer, held_out, seed=0, stream=2)
    return [sampler.sample(number, length=768) for number in range(2)]


@pytest.mark.slow
def test_kvzip_keeps_what_later_questions_ask_for(demo_samples):
    """Half the heads stream, and the others keep a quarter; the latest tokens ask for nothing."""
    found, cache_bytes = {}, {}
    for keep_by, keep in (("kvzip", 0.25), ("snapkv", 0.25), ("snapkv", 1.0)):
        model = duo_jax.load("demo", keep=keep, keep_by=keep_by)
        forced, cache_bytes[keep_by, keep] = retrieval.read(model.runtime, demo_samples)
        exact = retrieval.judge(model.runtime, demo_samples, forced).exact
        found[keep_by, keep] = exact.mean()
    assert found["kvzip", 0.25] == found["snapkv", 1.0] == 1
    assert found["snapkv", 0.25] < 0.5
    assert cache_bytes["kvzip", 0.25] < 0.6 * cache_bytes["snapkv", 1.0]


@pytest.mark.slow  # test_evict.py computes what is kept by the definition
def test_snapkv_keeps_what_the_end_of_the_text_asks_for(demo_samples):
    model = duo_jax.load("demo", keep=0.25)
    for sample in demo_samples:
        start, stop = sample.answers[0]
        session = Session(model.runtime)
        session.append([sample.tokens[:start].tolist()])
        [written] = write(session, stop - start)
        # The question looks at the first words, and they bring their neighbours along.
        assert written[:4] == sample.tokens[start : start + 4].tolist()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["perplexity"], "no token is evicted, leave out --keep"),
        (["compare"], "methods decide for themselves what is kept"),
    ],
)
def test_commands_that_do_not_evict_say_so(words, reason, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate.main([*words, "--model", "demo", "--keep", "0.5"])
    assert error.value.code == 2
    assert reason in capsys.readouterr().err

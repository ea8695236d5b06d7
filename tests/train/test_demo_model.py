"""The demo model: the one that ships, and the command that makes it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.checkpoints import pretrained
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkey_templates import ORDINALS
from duo_jax.data.passkeys import PasskeyConfig
from duo_jax.errors import InputError
from duo_jax.model import llama
from train.demo_model import run
from train.demo_model.curriculum import MODEL, Stage, drawn_stage, learning_rate
from train.demo_model.documents import DocumentSource
from train.demo_model.flags import DemoConfig
from train.demo_model.presets import PRESET, TEMPLATES
from train.retrieval_test import RetrievalTest


@pytest.fixture(scope="module")
def demo():
    folder = pretrained.resolve("demo")
    return (
        folder,
        pretrained.load_config(folder),
        pretrained.load_params(folder, dtype=jnp.float32),
        pretrained.load_tokenizer(folder),
    )


def test_tokenizer_round_trips_any_text(demo):
    tokenizer = demo[3]
    text = "def f(x):\n    return x ** 2  # Grüße, 你好\t\n\n  The end."
    tokens = tokenizer(text).input_ids
    assert tokens[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_ordinals_are_single_tokens(demo):
    tokenizer = demo[3]
    for name in ORDINALS:
        assert len(tokenizer(f" {name}", add_special_tokens=False).input_ids) == 1


def test_preset_is_in_the_folder_and_describes_the_samples(demo):
    preset = json.loads((demo[0] / "identify.json").read_text())
    assert preset == PRESET
    data = PasskeyConfig(**preset["data"])
    assert (data.needle, data.question) == (TEMPLATES.needle, TEMPLATES.question)


@pytest.mark.slow
def test_retrieves_at_its_longest_length_and_not_while_streaming(demo):
    _, model, params, tokenizer = demo
    assert model.max_positions == 1024
    held_out = load_documents([])[9:200:10]  # some of what was held out when it was trained
    data = dataclasses.replace(
        TEMPLATES, num_passkeys=8, passkey_words=8, min_length=1, max_length=1024
    )
    samples = RetrievalTest(data, tokenizer, held_out, held_out, num_samples=4, seed=7)
    assert samples.haystack == "held-out text"
    heads = np.ones((model.num_layers, model.num_kv_heads), bool)
    sizes = {"sink_size": PRESET["sink"], "recent_size": PRESET["recent"]}
    full = samples.accuracy(model, params, heads, **sizes)
    streaming = samples.accuracy(model, params, ~heads, **sizes)
    assert full.mean() >= 0.9
    assert streaming.mean() < 0.2


def test_transformers_computes_the_same_logits(demo):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder, model, params, _ = demo
    tokens = np.random.default_rng(0).integers(2, model.vocab_size, (2, 70), np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()

    @jax.jit
    def logits(params, tokens):
        return llama.logits(model, params, llama.hidden_states(model, params, tokens)[0])

    ours = np.asarray(logits(params, tokens))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


TINY = dataclasses.replace(
    MODEL, embed_size=16, mlp_size=16, num_layers=1, num_q_heads=2, num_kv_heads=1, head_dim=8
)
STAGES = (
    Stage(
        length=64,
        batch_size=2,
        num_passkeys=(2,),
        passkey_words=(3,),
        repeat=0.5,
        learning_rate=1e-2,
        threshold=0.0,  # reached at the first check
    ),
    Stage(
        length=64,
        batch_size=2,
        num_passkeys=(2,),
        passkey_words=(3, 4),
        rehearse=0.5,
        learning_rate=1e-2,
        final_learning_rate=1e-3,
        max_steps=5,
    ),
)
FLAGS = DemoConfig(check_every=3, checkpoint_every=2, test_samples=1, test_lengths=(64,))


def train(flags: DemoConfig, stages: tuple[Stage, ...] = STAGES) -> None:
    run.train_demo_model(flags, architecture=TINY, stages=stages)


class _KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def little_text():
    """Spare tiny runs what takes most of their time: tokenizing all text, drawing weights anew."""
    text = load_documents([])[:20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_documents", lambda _: text)
        once = jax.jit(run.init_state, static_argnames=("architecture", "seed", "weight_decay"))
        patch.setattr(run, "init_state", once)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, little_text):  # noqa: ARG001
    config = dataclasses.replace(FLAGS, workdir=str(tmp_path_factory.mktemp("demo") / "run"))
    train(config)
    return config


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, uninterrupted):
    config = dataclasses.replace(FLAGS, workdir=str(tmp_path / "run"))
    train_step = run.train_step

    def die_after(state, *args, **kwargs):
        if int(state.step) == 5:
            raise _KilledError
        return train_step(state, *args, **kwargs)

    monkeypatch.setattr(run, "train_step", die_after)
    with pytest.raises(_KilledError):
        train(config)
    assert not config.folder().exists()
    monkeypatch.setattr(run, "train_step", train_step)
    train(config)

    first, second = (
        {f.name: f.read_bytes() for f in c.folder().iterdir()} for c in (uninterrupted, config)
    )
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert first[name] == second[name]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [m["step"] for m in metrics] == list(range(1, 9))
    assert [m["stage"] for m in metrics] == [1] * 3 + [2] * 5


@pytest.mark.slow
def test_another_configuration_is_refused(uninterrupted):
    changed = dataclasses.replace(
        uninterrupted, filler_weight=0.1, output=uninterrupted.folder().with_name("other")
    )
    with pytest.raises(InputError, match=r"filler_weight was 0.2, is 0.1"):
        train(changed)


@pytest.mark.slow
def test_a_finished_model_is_not_overwritten(uninterrupted):
    with pytest.raises(InputError, match="exists already"):
        train(uninterrupted)


@pytest.mark.slow
def test_a_stage_that_is_not_learned_is_reported(tmp_path, little_text):  # noqa: ARG001
    stage = dataclasses.replace(STAGES[0], threshold=1.0, max_steps=3)
    config = dataclasses.replace(FLAGS, workdir=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"stage 1 predicts .* after 3 steps"):
        train(config, (stage,))
    assert not config.folder().exists()


def test_weights_mark_exactly_what_can_be_predicted(demo):
    stage = dataclasses.replace(STAGES[0], length=96, batch_size=16)
    training, _ = split_held_out(load_documents([])[:20])
    batch = DocumentSource(stage, demo[3], training, TEMPLATES, seed=0).training_batch(0)
    again = DocumentSource(stage, demo[3], training, TEMPLATES, seed=0).training_batch(0)
    for first, second in zip(jax.tree.leaves(batch), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(first, second)
    kinds = set()
    for tokens, answer, filler in zip(batch.tokens, batch.answer, batch.filler, strict=True):
        tokens, answer, filler = (np.asarray(x) for x in (tokens, answer, filler))
        assert not (answer * filler).any()
        if filler.any():
            kinds.add("passkeys")
            asked = tokens[answer > 0]
            assert asked.size == 2 * 3
            text = np.arange(tokens.size) <= np.flatnonzero(filler).max()
            text[0] = False  # nothing predicts the first token
            hidden = tokens[text & (filler == 0)]
            assert sorted(asked) == sorted(hidden)
        else:
            kinds.add("repeat")
            period = int((answer == 0).sum())
            np.testing.assert_array_equal(tokens[period:], tokens[:-period])
    assert kinds == {"passkeys", "repeat"}


def test_learning_rate_warms_up_and_decays():
    def rate(stage: Stage, step: int, stage_step: int) -> float:
        return learning_rate(stage, step=step, stage_step=stage_step, warmup_steps=10)

    steady, decaying = STAGES
    assert rate(steady, 0, 0) == pytest.approx(1e-3)
    assert rate(steady, 9, 9) == pytest.approx(1e-2)
    assert rate(decaying, 20, 0) == pytest.approx(1e-2)
    assert rate(decaying, 24, 4) == pytest.approx(2.8e-3)


@pytest.mark.slow
def test_rehearsal_draws_earlier_stages():
    drawn = [drawn_stage(STAGES, 1, step=step, seed=0) for step in range(200)]
    assert 0.35 < np.mean([number == 0 for number in drawn]) < 0.65
    assert {drawn_stage(STAGES, 0, step=step, seed=0) for step in range(20)} == {0}

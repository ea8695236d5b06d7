"""Heads by reconstruction (`--method reconstruct`): scores of plain texts, resumed, served."""

import pathlib

import numpy as np
import pytest

import duo_jax
from duo_jax.checkpoints import pretrained
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkeys import PasskeyConfig, PasskeySampler
from duo_jax.heads import reconstruction
from duo_jax.heads.pattern import load_pattern
from train.identify import reconstruct as reconstruct_module
from train.identify.__main__ import main

pytestmark = pytest.mark.usefixtures("unhooked_file", "little_text")

FLAGS = (
    "--method reconstruct --profile-samples 3 --checkpoint-every 2 --dtype float32 --sink 4 "
    "--recent 12 --min-length 40 --max-length 256 --num-passkeys 3 --passkey-words 4 "
    "--length-buckets 1 --eval-samples 0"
).split()


def reconstructed(model, workdir: pathlib.Path, *flags) -> bytes:
    main(["--model", str(model), "--workdir", str(workdir), *FLAGS, *flags])
    return (workdir / "pattern" / "full_attention_heads.tsv").read_bytes()


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "reconstruct"
    reconstructed(tiny_model, workdir)
    return workdir


def test_scores_are_the_mean_over_plain_texts_beyond_what_streaming_heads_keep(
    finished, tiny_model
):
    training_text, _ = split_held_out(load_documents(()))
    data = PasskeyConfig(min_length=40, max_length=256, num_passkeys=3, passkey_words=4)
    sampler = PasskeySampler(data, pretrained.load_tokenizer(tiny_model), training_text, seed=0)
    instruction = reconstruction.Instruction.of(sampler.encode)
    params = pretrained.load_params(tiny_model, dtype=np.float32)
    scores = []
    for index in range(3):
        text = sampler.plain_text(index).tokens
        scores.append(
            reconstruction.key_scores(
                pretrained.load_config(tiny_model),
                params,
                np.pad(text, (0, 256 - text.size))[None],
                np.array([text.size], np.int32),
                instruction=instruction,
                sink_size=4,
                recent_size=12,
            )[:, 0].max(axis=-1)
        )
    pattern = load_pattern(finished / "pattern")
    np.testing.assert_allclose(pattern.gates, np.mean(scores, axis=0), rtol=1e-4)
    assert (pattern.sink_size, pattern.recent_size) == (4, 12)
    assert (pattern.extra["method"], pattern.extra["num_samples"]) == ("reconstruct", 3)


def test_scores_are_reported_drawn_and_served(finished, tiny_model):
    words = (finished / "report.md").read_text()
    assert "reconstruction of 3 texts" in words
    assert "Scores: mean" in words
    assert (finished / "gates.png").exists()
    assert not (finished / "history.png").exists()
    model = duo_jax.load(str(tiny_model), pattern=str(finished / "pattern"), sparsity=0.5)
    assert model.config.num_retrieval_heads == 2


@pytest.mark.slow
def test_interrupted_reconstruction_resumes_to_the_same_bits(
    finished, tiny_model, tmp_path, monkeypatch
):
    calls = []

    def fail_at_third(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reconstruction.key_scores(*args, **options)

    monkeypatch.setattr(reconstruct_module, "key_scores", fail_at_third)
    with pytest.raises(SystemExit):
        reconstructed(tiny_model, tmp_path / "run")
    expected = (finished / "pattern" / "full_attention_heads.tsv").read_bytes()
    assert reconstructed(tiny_model, tmp_path / "run") == expected
    assert len(calls) == 3 + 1

import itertools
from types import SimpleNamespace

import pytest

from tests import models
from train.identify.__main__ import main

# Small enough that a whole identification takes seconds.
TINY_FLAGS = (
    "--method optimise --num-steps 24 --checkpoint-every 5 --dtype float32 --sink 4 --recent 12 "
    "--reg-weight 0.2 "
    "--min-length 40 --max-length 256 --num-passkeys 3 --passkey-words 4 --length-buckets 1 "
    "--eval-samples 2 --eval-sparsities 0.5 --eval-random-seeds 2"
).split()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return a Hugging Face folder of a tiny random Llama with a tokenizer."""
    raw = models.llama(vocab_size=600, max_position_embeddings=512)
    folder = models.write_hf(tmp_path_factory.mktemp("models") / "tiny-llama", raw)
    return models.write_tokenizer(folder)


@pytest.fixture
def given_to_the_search(monkeypatch, tmp_path):
    """Return a function that runs the command, in a new work folder, up to the search for heads.

    It returns what the search is given: flags, architecture, params and sampler.
    """
    given, folders = [], itertools.count()

    def stop(flags, architecture, params, sampler, workdir):
        del workdir
        given.append(
            SimpleNamespace(flags=flags, architecture=architecture, params=params, sampler=sampler)
        )
        raise KeyboardInterrupt

    monkeypatch.setattr("train.identify.training.train", stop)
    monkeypatch.setattr("train.identify.profile.profile", stop)

    def run(*words: str) -> SimpleNamespace:
        with pytest.raises(SystemExit):
            main([*words, "--workdir", str(tmp_path / f"run-{next(folders)}")])
        return given.pop()

    return run

"""What the evaluations' tests share; those of lm-evaluation-harness are skipped without it."""

import importlib.util
import pathlib
import socket

import numpy as np
import pytest

from duo_jax.heads.pattern import Pattern, save_pattern
from tests import models


@pytest.fixture(scope="module", autouse=True)
def _as_users_run_them(unhooked_file: None) -> None:
    del unhooked_file


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> pathlib.Path:
    """Write a model that some of the fixture's texts are too long for."""
    raw = models.llama(vocab_size=400, max_position_embeddings=64, num_hidden_layers=1)
    folder = models.write_hf(tmp_path_factory.mktemp("model"), raw)
    return models.write_tokenizer(folder, vocab_size=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Write a model of one layer, with a pattern of its own."""
    raw = models.llama(
        vocab_size=600, max_position_embeddings=512, num_hidden_layers=1, num_key_value_heads=4
    )
    folder = models.write_hf(tmp_path_factory.mktemp("model") / "tiny", raw)
    models.write_tokenizer(folder)
    save_pattern(
        Pattern(gates=np.array([[0.9, 0.1, 0.2, 0.8]]), sink_size=4, recent_size=12),
        folder / "pattern",
    )
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    """Fail where a connection is opened; keep data sets in the test's own folder."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip('lm-evaluation-harness is not installed: pip install "duo_jax[eval]"')
    import datasets

    def refuse(_, address):
        raise AssertionError(f"a connection to {address} was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "modules")

"""Benchmarks are whole commands."""

import pathlib
import subprocess
import types

import numpy as np
import pytest

from duo_jax.evaluate import __main__ as evaluate
from duo_jax.heads.pattern import Pattern, save_pattern
from tests import models


@pytest.fixture(scope="module", autouse=True)
def _as_users_run_them(unhooked_file: None) -> None:
    del unhooked_file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a tiny model's folder, with a pattern in it."""
    raw = models.llama(
        vocab_size=600, max_position_embeddings=512, num_hidden_layers=1, num_key_value_heads=4
    )
    folder = models.write_hf(tmp_path_factory.mktemp("real") / "tiny", raw)
    models.write_tokenizer(folder)
    pattern = Pattern(gates=np.array([[0.9, 0.1, 0.2, 0.8]]), sink_size=4, recent_size=12)
    save_pattern(pattern, folder / "pattern")
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run commands in this process; return the list of those that were started."""
    seen: list[list[str]] = []

    def run(words, **_):
        assert words[1:3] == ["-m", "duo_jax.evaluate"]
        seen.append(words[3:])
        try:
            evaluate.main(words[3:])
        except SystemExit as ended:
            return types.SimpleNamespace(returncode=ended.code)
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return seen

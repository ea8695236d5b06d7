"""Scores of heads that others publish: read as patterns, or refused in one line."""

import io
import json

import numpy as np
import pytest

from convert.kvzip_scores import read_scores
from duo_jax.heads.headwise_config import read_headwise_config
from tests.convert.test_scores import HEADWISE
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import damaged_bytes, json_files

torch = pytest.importorskip("torch")


def kvzip_file() -> bytes:
    file = io.BytesIO()
    torch.save(torch.linspace(0, 1, 15).reshape(5, 1, 3), file)
    return file.getvalue()


@fuzzed(json_files([json.dumps(HEADWISE)]))
def test_headwise_configs_are_read_or_refused(content, folder):
    file = folder / "config.json"
    file.write_bytes(content)
    pattern = attempt(lambda: read_headwise_config(file), size=len(content))
    assert pattern is REFUSED or np.isin(pattern.gates, (0, 1)).all()


@fuzzed(lambda: damaged_bytes([kvzip_file()]))
def test_files_of_kvzip_are_read_or_refused(content, folder):
    file = folder / "a.pt"
    file.write_bytes(content)
    scores = attempt(lambda: read_scores(file), size=len(content))
    assert scores is REFUSED or scores.ndim == 2

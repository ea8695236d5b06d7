"""Scores of heads that others publish become patterns, or are refused in one line."""

import json

import numpy as np
import pytest

from convert.scores import main
from duo_jax.heads.pattern import load_pattern

HEADWISE = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "headwise_config": {
        "sink_token_num": 8,
        "swa_token_num": 100,
        "seqlen_threshold": 16384,
        "0": [0, 1, 0, 0],
        "2": [0, 0, 0, 0],
    },
}


def test_a_kv_head_of_rtp_llm_is_a_retrieval_head_if_any_of_its_query_heads_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HEADWISE))
    main([str(tmp_path / "config.json"), str(tmp_path / "pattern")])
    pattern = load_pattern(tmp_path / "pattern")
    np.testing.assert_array_equal(pattern.gates, [[1, 0], [1, 1], [0, 0]])
    assert (pattern.sink_size, pattern.recent_size) == (8, 101)


def test_scores_of_kvzip_are_those_of_the_tensor(tmp_path):
    torch = pytest.importorskip("torch")
    scores = torch.rand(5, 3).to(torch.bfloat16)
    torch.save(scores[:, None], tmp_path / "model-scbench_qa_eng-0.pt")
    flags = [str(tmp_path / "model-scbench_qa_eng-0.pt"), str(tmp_path / "pattern")]
    main([*flags, "--recent", "512"])
    pattern = load_pattern(tmp_path / "pattern")
    np.testing.assert_array_equal(pattern.gates, scores.double().numpy())
    assert (pattern.sink_size, pattern.recent_size) == (128, 512)


class _Code:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Code(), "cannot be read as head scores: UnpicklingError"),
        ({"scores": 1}, "something else than a tensor"),
        ((30, 3, 2), "scores of shape (30, 3, 2)"),
        ((10**6,), "1,000,000 scores"),
    ],
    ids=["code", "no tensor", "shape", "size"],
)
def test_other_pickles_are_refused_and_run_nothing(tmp_path, capsys, content, message):
    torch = pytest.importorskip("torch")
    if isinstance(content, tuple):
        content = torch.zeros(1).expand(content)
    torch.save(content, tmp_path / "a.pt")
    refused([str(tmp_path / "a.pt"), str(tmp_path / "pattern")], capsys, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headwise_config": {"0": [0, 1]}}, "layer 0 has 2 heads, the model 4"),
        ({"headwise_config": {"3": [0] * 4}}, "names layer 3 of 3"),
        ({"headwise_config": {"01": [0] * 4}}, "names layer 01 of 3"),
        ({"headwise_config": {"0": [0, 1, 2, 0]}}, "is 2: expected a whole number <= 1"),
        ({"headwise_config": {"swa_token_num": -1}}, "swa_token_num"),
        ({"headwise_config": None}, "headwise_config"),
        ({"num_key_value_heads": 3}, "no multiple of 3"),
    ],
    ids=str,
)
def test_malformed_headwise_configs_are_refused(tmp_path, capsys, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(HEADWISE | changes))
    refused([str(tmp_path / "config.json"), str(tmp_path / "pattern")], capsys, message)


def test_other_files_are_refused(tmp_path, capsys):
    refused([str(tmp_path / "a.txt"), str(tmp_path / "pattern")], capsys, "neither a .pt nor")


def refused(flags, capsys, message):
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 2
    error = capsys.readouterr()
    assert message in error.err
    assert error.err.count("\n") == 1
    assert "this ran" not in error.out

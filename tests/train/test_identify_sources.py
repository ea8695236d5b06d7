"""One model by three names: Hugging Face folder, hub name, converted checkpoint."""

import jax
import numpy as np
import pytest

from convert.__main__ import main as convert
from tests import models
from tests.train.conftest import TINY_FLAGS

pytestmark = pytest.mark.usefixtures("little_text")


@pytest.mark.slow
def test_the_search_is_given_the_same_however_the_model_is_stored(
    tmp_path, monkeypatch, given_to_the_search
):
    """Gates depend on nothing else; tests/convert reads what torch has written."""
    raw = models.qwen3(vocab_size=600, max_position_embeddings=512)
    folder = models.write_tokenizer(models.write_hf(tmp_path / "hf", raw, dtype="bfloat16"))

    cached = tmp_path / "hub" / "models--tiny--qwen3"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123456789abcdef")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "0123456789abcdef").symlink_to(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    convert([str(folder), str(tmp_path / "converted")])

    first, *others = (
        given_to_the_search("--model", source, *TINY_FLAGS)
        for source in (str(folder), "tiny/qwen3", str(tmp_path / "converted"))
    )
    for other in others:
        assert other.architecture == first.architecture
        assert jax.tree.structure(other.params) == jax.tree.structure(first.params)
        for a, b in zip(jax.tree.leaves(other.params), jax.tree.leaves(first.params), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(
            other.sampler.sample(0).tokens, first.sampler.sample(0).tokens
        )

import pytest

from tests import models

# Small enough that a whole identification takes seconds.
TINY_FLAGS = (
    "--num-steps 24 --checkpoint-every 5 --dtype float32 --sink 4 --recent 12 --reg-weight 0.2 "
    "--min-length 40 --max-length 256 --num-passkeys 3 --passkey-words 4 --length-buckets 2 "
    "--eval-samples 2 --eval-sparsities 0.5 --eval-random-seeds 2"
).split()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return a Hugging Face folder of a tiny random Llama with a tokenizer."""
    raw = models.llama(vocab_size=600, max_position_embeddings=512)
    folder = models.write_hf(tmp_path_factory.mktemp("models") / "tiny-llama", raw)
    return models.write_tokenizer(folder)

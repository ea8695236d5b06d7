"""Weights come to eight devices in parts: no second copy of them is ever in memory.

Each load runs in a process of its own, which is this file. The devices are processors, so that
their parts lie in the memory of the host, where they can be counted.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from convert import __main__ as convert
from tests import models

# 88 MB, of which 34 MB are the embedding, the largest tensor.
RAW = models.llama(
    vocab_size=16_384,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
LARGEST = 16_384 * 512 * 4
BESIDE = 24e6  # what programs and threads take, and libraries keep
# What is freed goes back to the system, and is not counted.
EXACT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def _anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def _measure(folder: pathlib.Path) -> dict[str, int]:
    """Load a model; return its bytes, and by how much memory grew at most."""
    import jax

    from duo_jax.checkpoints import pretrained
    from duo_jax.checkpoints.weights import open_weights
    from duo_jax.mesh.devices import make_mesh

    mesh = make_mesh(jax.devices())
    heads = np.arange(8)[None] % 2 == np.ones((4, 1))  # in another order than in the files
    weight_files = open_weights(folder)  # imports what it needs
    before = most = _anonymous()
    done = threading.Event()

    def look() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, _anonymous())
            time.sleep(0.002)

    looking = threading.Thread(target=look)
    looking.start()
    params = pretrained.load_split_params(weight_files, heads, mesh=mesh)
    done.set()
    looking.join()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"held": held, "grew": most - before, "stays": _anonymous() - before}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.write_hf(tmp_path_factory.mktemp("model") / "safetensors", RAW)


def load(folder: pathlib.Path) -> dict[str, int]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.duo_jax.mesh.test_loading_memory", str(folder)],
        env=os.environ | EXACT | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(found: dict[str, int]) -> None:
    assert 85e6 < found["held"] < 90e6
    assert found["grew"] < found["held"] + LARGEST + BESIDE, found
    assert found["stays"] < found["held"] + BESIDE, found


@pytest.mark.slow
def test_safetensors_are_loaded_in_parts(folder):
    check(load(folder))


@pytest.mark.slow
def test_a_checkpoint_is_loaded_in_parts(folder, tmp_path):
    convert.main([str(folder), str(tmp_path / "converted")])
    check(load(tmp_path / "converted"))


if __name__ == "__main__":
    print(json.dumps(_measure(pathlib.Path(sys.argv[1]))))

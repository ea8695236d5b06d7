"""Host memory of a conversion, and death in the middle, in processes of their own."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from duo_jax.checkpoints import tensor_names
from duo_jax.checkpoints.weights import open_weights
from duo_jax.model.hf_config import parse_config
from tests import models
from tests.processes import without_plugin_log
from tests.spanning import spanning

BOTH_WAYS = [[], ["--to-hf"]]
REPOSITORY = pathlib.Path(__file__).parents[2]

# The matrices of its MLPs have 8 MB each; everything else is small.
MB = 1 << 20
LARGE = models.llama(
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
)
TENSOR = 8 * MB

# Runs the command with each list of arguments and reports, in MB, by how much the anonymous memory
# of the process (what is its own, unlike mapped files) grew meanwhile.
MEASURED = """
import json, sys, threading, time
from convert.__main__ import main
from orbax.checkpoint.experimental import v1

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

peak = 0
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
grown = []
for arguments in json.loads(sys.argv[1]):
    before = peak = anonymous()
    main(arguments)
    grown.append(peak - before)
done.set()
thread.join()
print(json.dumps(grown))
"""


def write_large(folder: pathlib.Path, num_layers: int) -> pathlib.Path:
    """Write the model in bfloat16; every matrix repeats one random block."""
    raw = LARGE | {"num_hidden_layers": num_layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    block = np.random.default_rng(0).standard_normal(4096 * 1024, np.float32) * 0.02
    data = block.astype(ml_dtypes.bfloat16).tobytes()
    header, end = {}, 0
    for tensor in tensor_names.tensors(parse_config(raw)):
        start, end = end, end + 2 * tensor.size
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": tensor.hf_shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            start, end = entry["data_offsets"]
            file.write(data[: end - start])
    return folder


def growth(*conversions: list[object]) -> list[float]:
    """Return by how many bytes the memory of one process grew during each conversion."""
    arguments = json.dumps([list(map(str, words)) for words in conversions])
    command = [sys.executable, "-W", "error", "-c", MEASURED, arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    print(f"grew by {grown} MB; a tensor has {TENSOR / MB:.0f}")
    return [x * MB for x in grown]


@pytest.mark.slow
def test_host_memory_is_a_few_tensors_not_the_model(tmp_path):
    """36 equal tensors of 8 MB, 302 MB in all, there and back.

    Measured: 1 MB from safetensors to safetensors, 69 MB to a checkpoint, of which orbax's threads
    and tensorstore's pools are about 40 MB whatever the model, and 57 MB back, beside these; 110 MB
    on a machine with no time for orbax's threads.
    """
    large = write_large(tmp_path / "large", num_layers=12)
    total = 36 * TENSOR
    copy, checkpoint, back = growth(
        ["--to-hf", large, tmp_path / "copy"],
        [large, tmp_path / "checkpoint"],
        ["--to-hf", tmp_path / "checkpoint", tmp_path / "back"],
    )
    assert copy < 3 * TENSOR
    assert checkpoint < 0.4 * total
    assert back < 0.5 * total


def end_while_writing(tmp_path: pathlib.Path, number: int, *to_hf: str) -> tuple[int, str]:
    """Convert "large" to "out", send a signal in the middle; return the exit code and stderr."""
    write_large(tmp_path / "large", num_layers=6)
    command = [sys.executable, "-m", "convert", *to_hf, tmp_path / "large", tmp_path / "out"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    written = "params*" if not to_hf else "*.safetensors"
    while not list(tmp_path.glob(f".out.partial/{written}")):
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate()
    return process.returncode, without_plugin_log(said)


@pytest.mark.parametrize(("number", "to_hf"), spanning([signal.SIGKILL, signal.SIGTERM], BOTH_WAYS))
def test_ended_in_the_middle_then_started_again(tmp_path, number, to_hf):
    """Terminated, it says so and leaves nothing; killed, it leaves what the next one clears up."""
    code, said = end_while_writing(tmp_path, number, *to_hf)
    if number == signal.SIGTERM:
        assert (code, said) == (143, "terminated\n")
        assert [path.name for path in tmp_path.iterdir()] == ["large"]
        return
    assert code == -signal.SIGKILL
    large, out = tmp_path / "large", tmp_path / "out"
    assert {path.name for path in tmp_path.iterdir()} == {"large", ".out.partial", ".out.lock"}

    main([*to_hf, str(large), str(out)])
    assert {path.name for path in tmp_path.iterdir()} == {"large", "out"}
    ours, theirs = open_weights(out), open_weights(large)
    for tensor in ours.tensors[-3:]:
        assert ours.read(tensor).tobytes() == theirs.read(tensor).tobytes()

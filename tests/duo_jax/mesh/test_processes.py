"""Two real processes of four devices each serve one model."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from duo_jax import generate
from tests.processes import without_plugin_log

pytestmark = pytest.mark.skipif(
    os.environ["JAX_PLATFORMS"] != "cpu", reason="processors stand for devices"
)


def start(*words: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    # Of the log of jax' own service nothing is ours.
    environment = os.environ | {"XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "duo_jax.generate", "--coordinator", f"localhost:{port}"]
    return [
        subprocess.Popen(
            [*command, "--num-processes", "2", "--process-id", str(rank), *words],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]


def test_two_processes_write_what_one_does(tmp_path, capsys):
    words = ["--max-new-tokens", "8", "--save-cache", str(tmp_path / "two")]
    found = [process.communicate(timeout=240) for process in start(*words)]
    one = ["--max-new-tokens", "8", "--save-cache", str(tmp_path / "one"), "--devices", "1"]
    generate.main(one)
    printed = capsys.readouterr()
    assert [out for out, _ in found] == [printed.out, ""]
    for _, err in found:
        assert "[on 8 x cpu]" in err
        numbers = r"cache [\d.]+ MB, with full caches only [\d.]+ MB"
        assert re.findall(numbers, err) == re.findall(numbers, printed.err)
    for name in ("layer-00000.safetensors", "tokens.safetensors"):
        sizes = {(tmp_path / folder / name).stat().st_size for folder in ("one", "two")}
        assert len(sizes) == 1


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_end_of_one_process_ends_the_other_with_a_line(victim):
    both = start("--max-new-tokens", "150", "--temperature", "0")
    assert both[0].stdout is not None
    written = ""
    while not written.endswith("Passkey"):  # the first word of the answer
        written += (character := both[0].stdout.read(1))
        assert character
    both[victim].send_signal(signal.SIGKILL)
    both[victim].communicate()
    began = time.monotonic()
    _, err = both[1 - victim].communicate(timeout=120)
    assert time.monotonic() - began < 30
    assert both[1 - victim].returncode == 1, err
    lines = without_plugin_log(err).splitlines()
    assert lines[-1].startswith("error: another process was lost")
    assert not any("Traceback" in line for line in lines), err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-processes", "2"], "go with --coordinator"),
        (["--coordinator", "here:1"], "needs --num-processes and --process-id"),
        (
            ["--coordinator", "here", "--num-processes", "2", "--process-id", "0"],
            "is not host:port",
        ),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], "0 to 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        generate.main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err

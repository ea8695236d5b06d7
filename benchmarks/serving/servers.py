"""Servers in processes of their own: ours, and the one of transformers."""

import contextlib
import http.client
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from benchmarks.serving.load import LoadError

_START = 300  # seconds to load and compile


def duo_command(model: str, port: int, flags: Sequence[str]) -> list[str]:
    """Return how our server is started."""
    words = ["--model", model, "--served-model-name", "model", "--port", str(port)]
    return [sys.executable, "-m", "duo_jax.server", *words, *flags]


def transformers_command(model: str, port: int, flags: Sequence[str]) -> list[str]:
    """Return how transformers' server is started on a Hugging Face folder."""
    program = str(pathlib.Path(sys.executable).with_name("transformers"))
    return [program, "serve", model, "--device", "cpu", "--port", str(port), *flags]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running(command: Sequence[str], port: int) -> Iterator[subprocess.Popen]:
    """Run a server until the block ends; it is ready when the block begins.

    Raises:
      LoadError: it ends before, or is never ready.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        try:
            end = time.monotonic() + _START
            while not _ready(port):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise LoadError(f"the server did not start: {''.join(last)}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()

"""The command: its flags, what it refuses, and how its process ends."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import httpx2
import pytest

from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.server import __main__ as command
from duo_jax.server import serving
from duo_jax.server.flags import ServerFlags

ROOT = pathlib.Path(__file__).parents[3]
FEW = ["--max-requests", "2", "--no-warm-up"]  # programs
LONG = {"prompt": "us us us", "max_tokens": 300, "temperature": 0, "stream": True}


@contextlib.contextmanager
def running(port=0):
    """Run the command; yield its process and its address, once the model is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "duo_jax.server", "--port", str(port), *FEW],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("serving "):
            assert line, process.stderr.read()
        yield process, re.fullmatch(r"serving demo at (http://127\.0\.0\.1:\d+)\n", line)[1]
    finally:
        process.kill()
        process.communicate()


def chunks(url):
    """Yield the chunks of a long text."""
    with httpx2.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


@pytest.mark.slow
def test_a_server_that_is_terminated_lets_a_stream_end_and_ends_with_0():
    with running() as (process, url):
        stream = chunks(url)
        next(stream)
        process.send_signal(signal.SIGTERM)
        while (health := httpx2.get(f"{url}/health")).status_code == 200:
            pass
        assert health.json() == {"status": "draining"}  # it can be asked while it ends
        *_, last = stream
        assert last["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0
        assert "running requests may end" in process.stderr.read()


@pytest.mark.slow
def test_a_server_that_was_killed_starts_again_and_a_second_interrupt_ends_it_at_once():
    with running() as (process, url):
        stream = chunks(url)
        next(stream)
        process.kill()
        with pytest.raises(httpx2.HTTPError):
            list(stream)
    with running(url.rpartition(":")[2]) as (process, url):
        stream = chunks(url)
        next(stream)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # as `timeout` sends it again, to the group
        time.sleep(0.5)
        next(stream)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 128 + signal.SIGINT
        assert time.monotonic() - began < 1


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        serving.serve(ServerFlags(model=str(tmp_path / "nowhere"), port=0))


def test_a_port_that_is_taken_is_one_line():
    with serving.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: Address already in use"):
            serving.listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["nowhere.invalid", "300.1.1.1", "a" * 300, "é" * 70, "::zz"])
def test_an_address_that_is_none_is_one_line(host):
    with pytest.raises(InputError, match="cannot listen"):
        serving.listen(host, 0)


def test_keys_are_the_lines_of_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("\ufeffone\n\n  two \n# of the tests\n")
    assert ServerFlags(api_keys=file).keys() == {"one", "two"}
    assert ServerFlags().keys() == frozenset()
    file.write_text("\n")
    with pytest.raises(InputError, match="holds 0 keys"):
        ServerFlags(api_keys=file).keys()
    with pytest.raises(InputError, match="nothing"):
        ServerFlags(api_keys=tmp_path / "nothing").keys()


def test_a_model_has_the_last_part_of_its_name():
    assert ServerFlags(model="org/name").name == "name"
    assert ServerFlags(model="/a/b.gguf").name == "b.gguf"
    assert ServerFlags(model="org/name", served_model_name="other").name == "other"


@pytest.mark.parametrize(
    ("said", "temperature"),
    [
        (None, 1.0),
        ({}, 1.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.6}, 0.6),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_the_model_suggests_or_as_openai_does(tmp_path, said, temperature):
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert command._defaults("", tmp_path).sampling.temperature == temperature


def test_the_demo_model_is_greedy():
    assert command._defaults("", pretrained.resolve("demo")).sampling.temperature == 0


def test_flags_are_parsed_and_others_refused(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(serving, "serve", given.append)
    command.main(["--sparsity", "0.75", "--port", "0", "--temperature", "0.3", "--pin", "a", "b"])
    [flags] = given
    assert (flags.sparsity, flags.sampling.temperature) == (0.75, 0.3)
    assert flags.pin == (pathlib.Path("a"), pathlib.Path("b"))
    for wrong in (["--port", "70000"], ["--keep", "0.5"], ["--max-requests", "0"]):
        with pytest.raises(SystemExit) as exit_:
            command.main(wrong)
        assert exit_.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_without_the_extra_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "_EXTRA", ("no_such_package",))
    with pytest.raises(SystemExit) as exit_:
        command.main([])
    assert exit_.value.code == 2
    assert 'pip install "duo_jax[server]"' in capsys.readouterr().err

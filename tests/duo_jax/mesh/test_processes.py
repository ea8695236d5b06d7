"""Two real processes of four devices each serve one model."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from convert import __main__ as convert
from duo_jax import generate
from duo_jax.cli import cluster
from duo_jax.errors import InputError
from duo_jax.evaluate import __main__ as evaluate
from duo_jax.server import __main__ as server
from tests.processes import without_plugin_log
from tests.small_demo import small_demo
from train.identify import __main__ as identify

pytestmark = pytest.mark.skipif(
    os.environ["JAX_PLATFORMS"] != "cpu", reason="processors stand for devices"
)


def slurm(rank: int, port: int) -> dict[str, str]:
    """What SLURM tells the processes of a job step: here two, on two hosts that are one."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


def start(*words: str, auto: bool = False) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    # Of the log of jax' own service nothing is ours.
    environment = os.environ | {"XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "duo_jax.generate", *words, "--coordinator"]

    def place(rank: int) -> list[str]:
        if auto:
            return ["auto"]
        return [f"localhost:{port}", "--num-processes", "2", "--process-id", str(rank)]

    return [
        subprocess.Popen(
            [*command, *place(rank)],
            env=environment | (slurm(rank, port) if auto else {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]


# Each process reads its parts of a checkpoint, and checks what it read together with the other.
@pytest.mark.parametrize("stored", ["hf", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_two_processes_write_what_one_does(tmp_path, capsys, stored):
    model = small_demo()
    if stored == "checkpoint":
        convert.main([str(model), str(tmp_path / "checkpoint")])
        model = tmp_path / "checkpoint"
    words = ["--model", str(model), "--max-new-tokens", "8"]
    both = start(*words, "--save-cache", str(tmp_path / "two"))
    found = [process.communicate(timeout=240) for process in both]
    capsys.readouterr()
    generate.main([*words, "--save-cache", str(tmp_path / "one"), "--devices", "1"])
    printed = capsys.readouterr()
    assert [out for out, _ in found] == [printed.out, ""]
    for _, err in found:
        assert "[on 8 x cpu]" in err
        numbers = r"cache [\d.]+ [kM]B; if all were full, [\d.]+ [kM]B"
        assert re.findall(numbers, err) == re.findall(numbers, printed.err)
    for name in ("layer-00000.safetensors", "tokens.safetensors"):
        sizes = {(tmp_path / folder / name).stat().st_size for folder in ("one", "two")}
        assert len(sizes) == 1


# The processes find each other by what a cluster tells them: no further two need to be started.
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_end_of_one_process_ends_the_other_with_a_line(victim):
    both = start("--max-new-tokens", "150", "--temperature", "0", auto=True)
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
    ("environment", "alone"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
    ],
)
def test_a_process_that_is_alone_on_its_host_gets_all_gpus(monkeypatch, environment, alone):
    given: list[dict] = []

    def initialize(**where):
        given.append(where)
        raise RuntimeError("not here")

    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    try:
        with pytest.raises(InputError, match="do not find each other: not here"):
            cluster.ClusterFlags(coordinator="auto").joined().__enter__()
    finally:
        jax.config.update("jax_enable_recoverability", False)  # as before
    assert given[0]["local_device_ids"] == ([] if alone else None)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (evaluate, ["passkeys"]),
        (identify, []),
        (server, []),
    ],
)
def test_commands_of_one_process_refuse_others_in_a_line(module, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        module.main([*words, "--coordinator", "host:1"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert "--coordinator" in error
    assert error.count("\n") == 1


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

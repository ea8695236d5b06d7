"""Everything that needs eight devices runs in one process that has them, as processors."""

import os
import pathlib
import subprocess
import sys

import pytest

FILES = sorted(
    str(path)
    for path in pathlib.Path(__file__).parent.glob("*_on_devices.py")
    if path.name != pathlib.Path(__file__).name
)


# Where others use the machine too, eight threads may be long in coming to the same place.
SLOWLY = [
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
    "--xla_cpu_collective_call_terminate_timeout_seconds=900",
    "--xla_cpu_collective_timeout_seconds=900",
]
OPTIONS = ["-o", "addopts=--strict-markers"]  # types are checked by the tests on one device


def run(*words: str) -> None:
    flags = " ".join([os.environ["XLA_FLAGS"], "--xla_force_host_platform_device_count=8", *SLOWLY])
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *OPTIONS, *FILES, *words]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(os.environ["JAX_PLATFORMS"] != "cpu", reason="processors stand for devices")
def test_on_eight_devices():
    run("-m", "not slow")


@pytest.mark.slow
@pytest.mark.skipif(os.environ["JAX_PLATFORMS"] != "cpu", reason="processors stand for devices")
def test_the_rest_on_eight_devices():
    run("-m", "slow")

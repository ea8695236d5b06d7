"""The machine and the command that numbers were measured with."""

import dataclasses
import os
import pathlib
import platform
import shlex
import sys
import time
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CPUINFO = pathlib.Path("/proc/cpuinfo")


def environment() -> dict[str, Any]:
    """Describe hardware and versions, and how busy others keep the machine."""
    return {
        "hardware": f"{_device_name()}, {cores()} cores, {platform.machine()}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def command(module: str) -> str:
    """Return how the running command was typed."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def to_json(flags: Any) -> dict[str, Any]:
    """Return the fields of a flags dataclass as JSON holds them."""
    values = dataclasses.asdict(flags)
    return {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in values.items()}


def cores() -> int:
    """Count the cores this process may use (fewer than the machine's under taskset)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_bandwidth(*, size: int = 1 << 30, repeats: int = 5) -> float:
    """Return bytes per second of summing a large array, the best of some tries.

    It says what the byte floor means in time on this machine; it is no limit (a sum may be slower
    than the memory).
    """
    values = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(values).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        total(values).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return size / best


def copy_bandwidth(*, size: int = 1 << 28, repeats: int = 5) -> float:
    """Return the bytes per second that all cores together read and write, the best of some copies.

    Args:
      size: bytes that are copied, by every core a part; more than caches hold.
      repeats: copies.
    """
    workers = cores()
    parts = np.split(np.ones((workers, size // workers), np.uint8), workers)
    copies = [np.zeros_like(part) for part in parts]
    best = float("inf")
    with futures.ThreadPoolExecutor(workers) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.copyto, copies, parts))
            best = min(best, time.perf_counter() - began)
    return 2 * sum(part.nbytes for part in parts) / best


def _device_name() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "cpu"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "cpu"

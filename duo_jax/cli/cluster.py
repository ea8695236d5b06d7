"""Several processes that serve one model, such as one for each host: how they find each other.

All run the same command on the same input, and compute the same tokens; the first one prints. Each
loads its own part of the weights.
"""

import contextlib
import dataclasses
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from duo_jax.errors import InputError, cut
from duo_jax.process.peers import SECRET_BYTES, Watch
from duo_jax.schema.kinds import Count, Size

AUTO = "auto"
_PLACE_BYTES = 320  # of a secret, a port and the name of a host
_PATIENCE = 300  # seconds that processes wait for each other to start
# What messages name when a process or the network between them is gone.
_LOST = ("gloo", "nccl", "connection", "coordination", "heartbeat", "peer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """Flags of commands that several processes may run together."""

    coordinator: str | None = None
    """host:port of the first of several processes, one per host, that run this command together;
    it listens there. "auto": this and the next two come from the cluster's environment, such as
    SLURM's or Open MPI's."""
    num_processes: Count | None = None
    """How many processes run this command, each with --coordinator and its own --process-id."""
    process_id: Size | None = None
    """Which of them this is, from 0; the first one prints."""

    def check_cluster(self) -> None:
        """Refuse flags that do not go together.

        Raises:
          InputError: names those that are missing or too many.
        """
        count, number = self.num_processes, self.process_id
        if self.coordinator in (None, AUTO):
            if count is not None or number is not None:
                raise InputError("--num-processes and --process-id go with --coordinator host:port")
            return
        if not self.coordinator.rpartition(":")[2].isdecimal():
            raise InputError(f"--coordinator {self.coordinator!r} is not host:port")
        if count is None or number is None:
            raise InputError("--coordinator host:port needs --num-processes and --process-id")
        if number >= count:
            raise InputError(
                f"--process-id {number} is not one of {count} processes, 0 to {count - 1}"
            )

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Join the other processes, if there are any; where one is lost, end with one line.

        Raises:
          InputError: they do not find each other.
        """
        if self.coordinator is None:
            yield
            return
        where: dict[str, Any] = {"local_device_ids": [] if _alone_on_host() else None}
        if self.coordinator != AUTO:
            where |= {
                "coordinator_address": self.coordinator,
                "num_processes": self.num_processes,
                "process_id": self.process_id,
            }
        # Else jax ends this process with a page of text as soon as another one is lost.
        jax.config.update("jax_enable_recoverability", True)
        try:
            jax.distributed.initialize(**where, initialization_timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the processes do not find each other: {_short(error)}") from None
        # What libraries print, as Gloo does of each of its connections, goes to standard error.
        with _own_stdout() as stdout, contextlib.redirect_stdout(stdout):
            try:
                watch = self._watched()
                yield
                watch.goodbye()
            except jax.errors.JaxRuntimeError as error:
                if not any(word in str(error).lower() for word in _LOST):
                    raise
                _end(f" ({_short(error)})")

    def _watched(self) -> Watch:
        """Return connections to the other processes, or to the first one, that are watched."""
        watch, place = Watch(_end), np.zeros(_PLACE_BYTES, np.uint8)
        if jax.process_index() == 0:
            secret = secrets.token_bytes(SECRET_BYTES)
            port = watch.listen(secret).to_bytes(2, "big")
            told = secret + port + socket.gethostname().encode()
            place[: len(told)] = np.frombuffer(told, np.uint8)
        told = np.asarray(multihost_utils.broadcast_one_to_all(place)).astype(np.uint8).tobytes()
        secret, port = told[:SECRET_BYTES], told[SECRET_BYTES : SECRET_BYTES + 2]
        if jax.process_index() > 0:
            host = told[SECRET_BYTES + 2 :].rstrip(b"\0").decode()
            if self.coordinator is not None and self.coordinator != AUTO:
                host = self.coordinator.rpartition(":")[0].strip("[]")
            try:
                watch.connect(host, int.from_bytes(port, "big"), secret)
            except OSError as error:
                raise InputError(f"the first process cannot be reached: {error}") from None
        return watch


def _alone_on_host() -> bool:
    """Whether a cluster's environment tells of one process for each host, which has all its GPUs.

    Where there are several, jax gives each of them one GPU.
    """
    slurm = [os.environ.get(name) for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES")]
    if None not in slurm:
        return slurm[0] == slurm[1]
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def _short(error: Exception) -> str:
    return cut(" ".join(str(error).split()), 200)


_ending = threading.Lock()  # never released: the first thread that finds out tells


def _end(reason: str = "") -> None:
    """End this process, as another one is lost; at its usual end it would wait for that one."""
    _ending.acquire()
    print(f"error: another process was lost{reason}", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def _own_stdout() -> Iterator[IO[str]]:
    """Return what to print to: the standard output of the first process; of others, nothing.

    Meanwhile that of the process itself is standard error.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    place = os.dup(saved) if jax.process_index() == 0 else os.open(os.devnull, os.O_WRONLY)
    try:
        with open(place, "w", encoding=sys.stdout.encoding, errors="replace") as file:
            yield file
    finally:
        os.dup2(saved, 1)
        os.close(saved)

"""Several processes that serve one model, such as one for each host: how they find each other.

All run the same command on the same input, and compute the same tokens; the first one prints. Each
loads its own part of the weights.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

import jax

from duo_jax.errors import InputError, cut
from duo_jax.schema.kinds import Count, Size

AUTO = "auto"
_HEARTBEAT = 30  # seconds of silence after which a process counts as lost
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
        where: dict[str, Any] = {}
        if self.coordinator != AUTO:
            where = {
                "coordinator_address": self.coordinator,
                "num_processes": self.num_processes,
                "process_id": self.process_id,
            }
        try:
            jax.distributed.initialize(
                **where,
                initialization_timeout=_PATIENCE,
                heartbeat_timeout_seconds=_HEARTBEAT,
            )
        except (RuntimeError, ValueError) as error:
            reason = cut(" ".join(str(error).split()), 200)
            raise InputError(f"the processes do not find each other: {reason}") from None
        with contextlib.ExitStack() as stack:
            # What libraries print, as Gloo does of each of its connections, goes to standard error.
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(_own_stdout())))
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                if not any(word in str(error).lower() for word in _LOST):
                    raise
                reason = cut(" ".join(str(error).split()), 200)
                print(f"error: another process was lost ({reason})", file=sys.stderr, flush=True)
                # At its usual end this process would wait for the lost one.
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

"""Several processes that serve one model, such as one for each host: how they find each other.

All run the same command on the same input, and compute the same tokens; the first one prints. Each
loads its own part of the weights.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

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
        numbers = (self.num_processes, self.process_id)
        if self.coordinator in (None, AUTO):
            if numbers != (None, None):
                raise InputError("--num-processes and --process-id go with --coordinator host:port")
        elif None in numbers:
            raise InputError("--coordinator host:port needs --num-processes and --process-id")
        elif not self.coordinator.rpartition(":")[2].isdecimal():
            raise InputError(f"--coordinator {self.coordinator!r} is not host:port")
        elif self.process_id >= self.num_processes:
            raise InputError(
                f"--process-id {self.process_id} is not one of {self.num_processes} processes, "
                f"0 to {self.num_processes - 1}"
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
        with _printing_elsewhere():  # Gloo tells of each of its connections
            multihost_utils.sync_global_devices("duo_jax")
        with contextlib.ExitStack() as stack:
            if jax.process_index() > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
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
def _printing_elsewhere() -> Iterator[None]:
    """Send what libraries print to standard error."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)

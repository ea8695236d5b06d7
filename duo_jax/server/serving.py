"""The process of the server: a socket, a thread that loads and runs the engine, and its end."""

import contextlib
import functools
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from duo_jax.engine.engine import Engine
from duo_jax.errors import InputError
from duo_jax.server.app import make_app
from duo_jax.server.flags import ServerFlags
from duo_jax.server.service import Service, Settings
from duo_jax.server.warm_up import warm_up

_KEEP_ALIVE = 65  # seconds: longer than the minute after which proxies give up connections
_LAST_SECONDS = 5  # for answers on their way, once the engine has ended
_SAME_SIGNAL = 0.3  # seconds; `timeout` and others send it to us and to the group that we are in


class Server(uvicorn.Server):
    """uvicorn's server, which drains the engine before it ends."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._draining = False
        self._signalled = -math.inf

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have the first signal drain the server, and the second end the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) != signal.SIG_IGN  # as `&` in a script sets it
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def drain(self) -> None:
        """Take no more requests, let those that run end, then stop; returns at once."""
        if not self._draining:
            self._draining = True
            threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        try:
            self._service.drain(self._drain_seconds)
        finally:
            self.should_exit = True

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        now = time.monotonic()
        if now - self._signalled < _SAME_SIGNAL:
            return
        self._signalled = now
        if self._draining:
            _tell(b"ended at once\n")
            os._exit(128 + number)
        _tell(b"ending: running requests may end; a second signal ends at once\n")
        self.drain()


def serve(flags: ServerFlags) -> None:
    """Serve until a signal comes, or the engine fails.

    Raises:
      InputError: a flag cannot be used.
    """
    settings = Settings(
        name=flags.name,
        root=flags.model,
        sampling=flags.sampling,
        keys=flags.keys(),
        most_bytes=flags.max_body_bytes,
        most_texts=flags.queue,
    )
    with listen(flags.host, flags.port) as listening:
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        service = Service(
            settings,
            functools.partial(_make_engine, flags),
            on_ready=functools.partial(_say, f"serving {flags.name} at {url}"),
            on_failure=lambda: setattr(server, "should_exit", True),
        )
        server = make_server(service, flags.drain_seconds, access_log=flags.access_log)
        service.start()
        _say(f"loading {flags.model}; {url}/health tells when it is ready")
        server.run(sockets=[listening])
    if service.error is not None:
        raise service.error
    if service.thread.is_alive():  # still loading: jax' threads may crash Python's own end
        sys.stdout.flush()
        os._exit(0)


def make_server(service: Service, drain_seconds: float, *, access_log: bool = False) -> Server:
    """Return the HTTP server of a service; its `run` takes the sockets."""
    config = uvicorn.Config(
        make_app(service),
        log_level="info" if access_log else "warning",
        access_log=access_log,
        ws="none",
        lifespan="off",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    return Server(config, service, drain_seconds)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
      InputError: nobody can, as another program does.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((host, port))
        listening.listen(2048)
        return listening
    except (OSError, UnicodeError, TypeError) as error:  # Python names bad hosts in these ways
        listening.close()  # socket.create_server would not, but for an OSError
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at {host}, port {port}: {reason}") from None


def _make_engine(flags: ServerFlags) -> Engine:
    engine = Engine(
        flags.load(),
        max_requests=flags.max_requests,
        max_len=flags.max_len,
        cache_tokens=flags.cache_tokens,
        page_size=flags.page_size,
        queue=flags.queue,
        prefix_reuse=flags.prefix_reuse,
        snapshots=flags.snapshots,
        prefill_chunk=flags.prefill_chunk,
    )
    for folder in flags.pin:
        _say(f"pinned {engine.pin(folder):,} tokens of {folder}")
    if flags.warm_up:
        warm_up(engine)
    return engine


def _tell(line: bytes) -> None:
    with contextlib.suppress(OSError):  # stderr is closed; and a handler of signals cannot print
        os.write(2, line)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads: no reason to stop serving
        print(text, flush=True)

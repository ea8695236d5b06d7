"""Notice when another of several processes is gone: the system closes its connections.

The first process holds a connection to each of the others. A process that ends as it should says so
before it closes them. Where one does not, or its machine is silent for half a minute, `lost` is
called, in a thread of its own; it should end this process, whose own connections then end others.
"""

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable

SECRET_BYTES = 16
_GOODBYE = b"."
# Seconds of silence before the system asks, between questions, and how many stay unanswered.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_PATIENCE = 60.0  # seconds for a connection to be made


class Watch:
    """Connections between the first process and the others.

    Args:
      lost: called when a process is gone.
    """

    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()

    def listen(self, secret: bytes) -> int:
        """Wait, in a thread, for processes that know the secret; return the port."""
        server = socket.create_server(("", 0))
        threading.Thread(target=self._accept, args=(server, secret), daemon=True).start()
        return server.getsockname()[1]

    def connect(self, host: str, port: int, secret: bytes) -> None:
        """Connect to the first process.

        Raises:
          OSError: it cannot be reached.
        """
        connection = socket.create_connection((host, port), timeout=_PATIENCE)
        connection.sendall(secret)
        self._hold(connection)

    def goodbye(self) -> None:
        """Tell the others that this process ends as it should."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.sendall(_GOODBYE)

    def _accept(self, server: socket.socket, secret: bytes) -> None:
        while True:
            connection, _ = server.accept()
            connection.settimeout(_PATIENCE)
            with contextlib.suppress(OSError):
                given = connection.recv(SECRET_BYTES, socket.MSG_WAITALL)
                if secrets.compare_digest(given, secret):
                    self._hold(connection)
                    continue
            connection.close()

    def _hold(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        with self._lock:
            self._connections.append(connection)
        threading.Thread(target=self._wait, args=(connection,), daemon=True).start()

    def _wait(self, connection: socket.socket) -> None:
        said = b""
        with contextlib.suppress(OSError):
            said = connection.recv(1)
        if said != _GOODBYE:
            self._lost()

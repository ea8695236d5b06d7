"""What is refused before a body is read: requests without a key, and bodies that are too large."""

import hmac
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duo_jax.server.errors import ApiError

# Without a key: the page, which asks for one, and what tells whether the server runs.
_OPEN = frozenset(["/", "/health", "/version"])


class Limits:
    """Wrap an app; what it is asked for has a key and a body within bounds.

    Args:
      app: the app.
      keys: those that are accepted; none: no key is needed.
      most_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, *, keys: Collection[str], most_bytes: int) -> None:
        self._app, self._most = app, most_bytes
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in _OPEN and not self._has_key(headers):
            error = ApiError(
                401, "this server needs a key: Authorization: Bearer KEY", code="invalid_api_key"
            )
            await error.response()(scope, receive, send)
            return
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size[:20]) > self._most:
            await ApiError(413, self._too_large()).response()(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:  # sent in chunks, without a length
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, counted, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # All are compared, in a time that tells nothing about them.
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(found)

    def _too_large(self) -> str:
        return f"the body has more than {self._most:,} bytes, which --max-body-bytes sets"

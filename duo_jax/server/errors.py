"""Errors as OpenAI's clients read them: a status, and {"error": {"message", "type", ...}}.

400: the body cannot be used, as it is malformed, out of range, or too long for the model. 401: no
valid key. 404: no such path or model. 413: the body is too large. 422: it is well formed, but the
chat template or the grammar library refuses what it asks for. 429: as many requests wait as may.
503: the model is being loaded, or the server ends.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from duo_jax.engine.request import DrainingError, QueueFullError
from duo_jax.errors import InputError
from duo_jax.server.answers import Error, ErrorAnswer

_log = logging.getLogger("duo_jax.server")
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_RETRY = {"Retry-After": "1"}  # seconds; OpenAI's clients obey
# What an endpoint may answer beside 200, for the OpenAPI schema.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 413, 422, 429, 500, 503)
}

# What answers 200 may be, too: events, whose data are chunks as JSON, and [DONE] in the end.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": _EVENT}}}
}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> JSONResponse:
        """Return the HTTP answer."""
        headers = _RETRY if self.status in (429, 503) else None
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return respond(self.status, self.message, self.param, self.code, headers)

    def body(self) -> dict[str, Any]:
        """Return the JSON object, as a stream has it."""
        return _body(self.status, self.message, self.param, self.code)


def respond(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error as an HTTP answer."""
    return JSONResponse(_body(status, message, param, code), status, headers)


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error")
    message = message.encode(errors="replace").decode()  # half characters are no JSON
    return ErrorAnswer(error=Error(message=message, type=kind, param=param, code=code)).model_dump()


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told about an exception."""
    match error:
        case ApiError():
            return error
        case InputError():
            return ApiError(400, str(error))
        case QueueFullError():
            return ApiError(429, f"the server is busy: {error}", code="queue_full")
        case DrainingError():
            return ApiError(503, f"the server ends: {error}", code="draining")
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why")


def install(app: FastAPI) -> None:
    """Have an app answer all errors in OpenAI's shape."""
    for kind in (ApiError, InputError, QueueFullError, DrainingError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    del request
    return as_api_error(error).response()


async def _on_defect(request: Request, error: Exception) -> JSONResponse:
    """Answer; uvicorn logs the traceback."""
    del request, error
    return respond(500, "the server failed at this request; its log says why")


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    match error.__cause__:  # where a body could not be parsed, and not for a fault of its JSON
        case UnicodeDecodeError():
            message = "the body is not UTF-8 text"
        case RecursionError():
            message = "the body is nested too deeply"
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path}"
    return respond(error.status_code, message, headers=error.headers)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Say in one line what is wrong with a body, and where."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if isinstance(error.body, bytes):  # not looked at, for its header
        kind = request.headers.get("content-type", "none")
        message = f"send JSON, with the header Content-Type: application/json (it is {kind[:80]})"
        return respond(400, message)
    # Of a union, every member complains: the first place tells, and each thing said of it once.
    first = found[0]
    if first["type"] == "json_invalid":
        return respond(400, f"the body is not JSON: {first['ctx']['error']}")
    path = [str(part) for part in first["loc"] if part != "body"]
    name = path[0] if path else None
    same = [e["msg"] for e in found if [str(p) for p in e["loc"]][1:2] == path[:1]]
    where = ".".join(path) if len(same) == 1 else name
    return respond(400, f"{where or 'the body'}: {'; or '.join(dict.fromkeys(same))[:500]}", name)

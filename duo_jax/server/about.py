"""The page, and routes that tell about the server: models, health, version, metrics."""

import importlib.metadata
import importlib.resources

import jax
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from duo_jax.server.answers import Health, Model, Models, Stats, Version
from duo_jax.server.errors import RESPONSES
from duo_jax.server.service import Service

router = APIRouter(responses={401: RESPONSES[401]})
_PAGE = importlib.resources.files("duo_jax.server") / "page.html"
# The page asks this server alone, and shows no text as HTML; a browser holds it to that.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """Return a page to chat with the model."""
    text = _PAGE.read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})


@router.get("/v1/models", responses={503: RESPONSES[503]})
async def models(request: Request) -> Models:
    """List the models that are served."""
    return Models(data=[_model(request.app.state.service)])


@router.get("/v1/models/{name:path}", responses={404: RESPONSES[404], 503: RESPONSES[503]})
async def model(name: str, request: Request) -> Model:
    """Tell about a model."""
    service: Service = request.app.state.service
    service.check_model(name)
    return _model(service)


@router.get("/health", responses={503: {"model": Health}})
async def health(request: Request) -> JSONResponse:
    """Say whether requests are answered: 200, or 503 while the model loads or the server ends."""
    status = request.app.state.service.status
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@router.get("/version")
async def version() -> Version:
    """Return the version of what serves."""
    return Version(version=importlib.metadata.version("duo_jax"), jax=jax.__version__)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Return counts and latencies for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/stats")
async def stats(request: Request) -> Stats:
    """Return the engine's numbers as JSON, and what the page needs to know of the model."""
    service: Service = request.app.state.service
    engine = service.running
    chat = engine is not None and bool(engine.model.tokenizer.chat_template)
    known = {"model": service.settings.name, "status": service.status, "chat": chat}
    return known | service.metrics.stats()


def _model(service: Service) -> Model:
    return Model(
        id=service.settings.name,
        created=service.created,
        root=service.settings.root,
        max_model_len=service.engine.max_len,
    )

"""The server's routes, put together."""

from fastapi import FastAPI

from duo_jax.server import about, chat, completions, errors, tokenizer_routes
from duo_jax.server.limits import Limits
from duo_jax.server.service import Service


def make_app(service: Service) -> FastAPI:
    """Return the ASGI app of a service.

    Its pages of documentation are left out: they load scripts from elsewhere.
    """
    app = FastAPI(title="duo_jax", docs_url=None, redoc_url=None)
    app.state.service = service
    errors.install(app)
    app.add_middleware(Limits, keys=service.settings.keys, most_bytes=service.settings.most_bytes)
    for part in (completions, chat, tokenizer_routes, about):
        app.include_router(part.router)
    return app

"""A server of one layer of the demo model, for every test of a worker, and OpenAI's own client."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

import duo_jax
from duo_jax.api import DuoModel
from duo_jax.engine.engine import Engine
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.server import serving
from duo_jax.server.service import Service, Settings
from tests.duo_jax.server.template import TEMPLATE
from tests.small_demo import small_demo


@pytest.fixture(scope="module", autouse=True)
def _as_users_run_them(unhooked_file: None) -> None:
    del unhooked_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A running server."""

    url: str
    service: Service
    server: serving.Server

    @property
    def engine(self) -> Any:
        return self.service.engine

    def client(self, **settings: Any) -> openai.OpenAI:
        settings = {"api_key": "none", "max_retries": 0, "timeout": 60} | settings
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def http(self, **settings: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **settings)


@contextlib.contextmanager
def serving_of(make_engine: Any, **settings: Any) -> Iterator[Served]:
    """Run a server in a thread, at a free port."""
    settings = {"name": "demo", "root": "demo", "sampling": SamplingConfig()} | settings
    service = Service(Settings(most_texts=64, **settings), make_engine)
    server = serving.make_server(service, drain_seconds=5.0)
    with serving.listen("127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        service.start()
        try:
            yield Served(url=url, service=service, server=server)
        finally:
            server.drain()
            thread.join()
            service.thread.join()


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def model() -> DuoModel:
    """Return one layer of the demo model, with a chat template."""
    loaded = duo_jax.load(small_demo(), prefill_chunk=64)
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


@pytest.fixture(scope="session")
def served(model: DuoModel) -> Iterator[Served]:
    """Yield a server that all tests of this process share."""
    small = {"max_requests": 4, "max_len": 512, "prefill_chunk": 256}
    with serving_of(lambda: Engine(model, **small)) as running:
        wait_for(lambda: running.service.status != "loading")
        yield running


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="session")
def http(served: Served) -> Iterator[httpx2.Client]:
    with served.http() as client:
        yield client

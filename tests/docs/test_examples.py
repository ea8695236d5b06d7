"""The Python of README, pages and notebook runs, on half the demo model in place of others."""

import json
import pathlib
import re

import pytest
from matplotlib import pyplot

import duo_jax
from tests.small_demo import small_demo

ROOT = pathlib.Path(__file__).parents[2]
# Of a client: tests/duo_jax/server/test_server_docs.py has a server for it.
WITH_SERVER = ROOT / "docs/server.md"
NOTEBOOK = ROOT / "examples/quickstart.ipynb"
PAGES = sorted([ROOT / "README.md", NOTEBOOK, *ROOT.glob("docs/**/*.md")])
PAGES.remove(WITH_SERVER)


def blocks(page: pathlib.Path) -> list[str]:
    if page == NOTEBOOK:
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def demo() -> duo_jax.DuoModel:
    return duo_jax.load(small_demo(), sparsity=0.5)


LONG = ROOT / "docs/serving.md"  # more of what README's example shows


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page == LONG))
        for page in PAGES
        if blocks(page)
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_examples_run(page, demo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(duo_jax, "load", lambda *_, **__: demo)
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    text = (ROOT / "duo_jax/demo/prompt.txt").read_text(encoding="utf-8")
    (tmp_path / "book.txt").write_text(text[:600], encoding="utf-8")
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


def test_readme_and_the_page_on_serving_have_examples():
    assert len(blocks(ROOT / "README.md")) == 1
    assert len(blocks(ROOT / "docs/serving.md")) == 3

"""The site builds without a complaint, fetches nothing, and its links to lines arrive."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    """Build the site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_load_nothing_from_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8"))
        for tag in tags:
            assert not re.search(r'(?:src|href)="?(?:https?:)?//', tag), (page.name, tag)


def test_links_to_lines_arrive(site):
    links = re.findall(r'href="([^"#]+)#(L-0-\d+)"', (site / "architecture.html").read_text())
    assert len(links) >= 30
    for file, anchor in links:
        assert f'id="{anchor}"' in (site / file).read_text(encoding="utf-8")


def test_the_reference_has_what_the_package_exports(site):
    import duo_jax

    reference = (site / "reference/duo_jax.html").read_text(encoding="utf-8")
    for name in duo_jax.__all__:
        if name != "__version__":
            assert f'id="duo_jax.{name}"' in reference

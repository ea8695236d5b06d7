"""Links of all pages lead somewhere, as GitHub shows them; links to lines, to the right ones."""

import pathlib
import re

import pytest

from docs import line_numbers

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [*line_numbers.pages(), ROOT / "duo_jax/demo/README.md"]
_LINK = re.compile(r'\]\(([^()\s#]*)(#[^()\s]*)?(?:\s+"[^"]*")?\)')


def name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def headings(page: pathlib.Path) -> set[str]:
    """Return the anchors that GitHub, and the site, make of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        file = page.parent / target if target else page
        made = {
            "contributing.md",
            "changelog.md",
            "index.md",
            "security.md",
        }  # by docs/site_hooks.py
        assert file.is_file() or (file.parent == ROOT / "docs" and file.name in made), target
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{target}{anchor}"


@pytest.mark.parametrize("page", line_numbers.pages(), ids=name)
def test_links_to_lines_lead_to_the_line_that_they_name(page):
    text, lost = line_numbers.refresh(page)
    assert not lost
    assert text == page.read_text(encoding="utf-8"), "run python -m docs.line_numbers"


def test_architecture_leads_to_every_part_of_the_method():
    links = re.findall(r"#L\d+ ", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert len(links) >= 30


def test_a_line_that_moved_is_found_and_one_that_is_gone_is_named(tmp_path):
    (tmp_path / "code.py").write_text("first\nsecond(x)\nthird\nthird\n")
    page = tmp_path / "page.md"
    page.write_text('[a](code.py#L9 "second(")\n[b](code.py#L1 "gone")\n[c](code.py#L1)\n')
    page.write_text(page.read_text() + '[d](code.py#L1 "third")\n[e](none.py#L1 "x")\n')
    text, lost = line_numbers.refresh(page)
    assert text.splitlines()[0] == '[a](code.py#L2 "second(")'
    assert text.splitlines()[1:] == page.read_text().splitlines()[1:]
    assert [line.split(":")[1].split(",")[0] for line in lost] == [
        " 'gone' is on 0 lines",
        " None is on 0 lines",
        " 'third' is on 2 lines",
        " 'x' is on 0 lines",
    ]

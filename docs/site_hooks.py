"""mkdocs hooks: pages link to the repository's files as on GitHub, and the site holds these files.

A page may link to any file of the repository by a relative path, with a line if it likes:
`../kernels/masks.py#L32`. The site has a page for each file that is linked to: Markdown and
notebooks as they read, source text with line numbers, pictures as they are. README, CHANGELOG,
CONTRIBUTING and SECURITY are pages of the site too.
"""

import json
import pathlib
import posixpath
import re
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
_TOP_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_FOLDER = "repository"  # of the site: files from outside docs/
_AS_IT_IS = (".png", ".md")  # other files become pages around their text
_LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml"}
# A relative link: [text](target), [text](target "title"); ![picture](target) too.
_LINK = re.compile(r'\]\((?P<target>[^()\s#:]+)(?P<anchor>#[^()\s]*)?(?P<title>\s+"[^"]*")?\)')
_LINE_ID = re.compile(r'id="(L-0-\d+)"')
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, and the files that any page links to."""
    for path, uri in _TOP_PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    waiting = [_repository_path(file.src_uri) for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for path in _linked(page):
            if path not in seen:
                seen.add(path)
                if path.endswith(".md"):
                    waiting.append(path)
                if not path.startswith("docs/"):
                    files.append(_file(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links into the repository into links of the site."""
    here = page.file.src_uri
    base = posixpath.dirname(_repository_path(here))

    def of_site(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(base, link["target"]))
        if not (ROOT / path).is_file():
            return link[0]  # mkdocs reports it if it leads nowhere
        target = posixpath.relpath(_uri(path), posixpath.dirname(here) or ".")
        anchor = re.sub(r"^#L(\d+)$", r"#L-0-\1", link["anchor"] or "")
        return f"]({target}{anchor}{link['title'] or ''})"

    return _outside_fences(markdown, lambda text: _LINK.sub(of_site, text))


def on_page_content(html: str, page: Page, **_: object) -> None:
    """Tell mkdocs which lines there are, so that it checks links to them."""
    page.present_anchor_ids = {*(page.present_anchor_ids or ()), *_LINE_ID.findall(html)}


def _linked(page: str) -> Iterator[str]:
    """Return the files of the repository that a page of it links to."""
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in _LINK.finditer(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link["target"]))
        if (ROOT / path).is_file():
            yield path


def _repository_path(uri: str) -> str:
    """Return where a page of the site lies in the repository."""
    for path, top_uri in _TOP_PAGES.items():
        if uri == top_uri:
            return path
    if uri.startswith(f"{_FOLDER}/"):
        path = uri.removeprefix(f"{_FOLDER}/")
        return path if (ROOT / path).is_file() else path.removesuffix(".md")
    return f"docs/{uri}"


def _uri(path: str) -> str:
    """Return the address, in the site, of a file of the repository."""
    if path in _TOP_PAGES:
        return _TOP_PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{_FOLDER}/{path}" + ("" if path.endswith(_AS_IT_IS) else ".md")


def _file(path: str, config: MkDocsConfig) -> File:
    if path.endswith(_AS_IT_IS):
        return File.generated(config, _uri(path), abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8")
    content = _notebook(text) if path.endswith(".ipynb") else _source(path, text)
    return File.generated(config, _uri(path), content=content)


def _source(path: str, text: str) -> str:
    language = _LANGUAGES.get(pathlib.PurePath(path).suffix, "text")
    head = f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n"
    return f'{head}~~~~{language} linenums="1"\n{text}\n~~~~\n'


def _notebook(text: str) -> str:
    return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])


def _cell(cell: dict) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            picture = "".join(data["image/png"]).replace("\n", "")
            parts.append(f"![output](data:image/png;base64,{picture})")
        elif text := "".join(output.get("text", data.get("text/plain", ""))):
            parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


def _outside_fences(markdown: str, change) -> str:
    """Change the text between fenced blocks."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])

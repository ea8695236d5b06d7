"""Links from the pages to lines of code: every one names the text of its line, and is checked.

    python -m docs.line_numbers          # after a change of code: put the numbers right
    python -m docs.line_numbers --check  # only look; exit with 1 if one is wrong

A link to a line has the line's text, or a part that no other line of the file has, as its title:

    [mask](../kernels/masks.py#L43 "return causal_pairs(i, j) &")

so that the number can be found again. Where the text is gone, or is there twice, the page needs an
author: these links are listed, and the command exits with 1.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
_LINK = re.compile(r'\((?P<target>[^()\s#]+)#L(?P<number>\d+)(?:\s+"(?P<text>[^"\n]*)")?\)')


def pages() -> list[pathlib.Path]:
    """Return the Markdown files whose links are checked."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def refresh(page: pathlib.Path) -> tuple[str, list[str]]:
    """Return a page's text with the right line numbers, and what could not be found."""
    lost = []

    def renumber(link: re.Match[str]) -> str:
        file, text = page.parent / link["target"], link["text"]
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        found = [number for number, line in enumerate(lines, start=1) if text and text in line]
        if len(found) != 1:
            lost.append(f"{link['target']}: {text!r} is on {len(found)} lines, not on one")
            return link[0]
        return f'({link["target"]}#L{found[0]} "{text}")'

    return _LINK.sub(renumber, page.read_text(encoding="utf-8")), lost


def main(args: list[str]) -> int:
    """Write the pages anew, or only check them; return the exit code."""
    wrong = False
    for page in pages():
        text, lost = refresh(page)
        for line in lost:
            print(f"error: {page.relative_to(ROOT)}: {line}", file=sys.stderr)
        stale = text != page.read_text(encoding="utf-8")
        if stale:
            print(f"{page.relative_to(ROOT)}: line numbers have moved")
        if stale and "--check" not in args:
            page.write_text(text, encoding="utf-8")
        wrong |= bool(lost) or (stale and "--check" in args)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The cases beside this file, as seeds."""

import pathlib

import duo_jax

DEMO = pathlib.Path(duo_jax.__file__).parent / "demo"
CASES = pathlib.Path(__file__).parent / "cases"


def of_cases(pattern: str) -> list[str]:
    """Return the JSON texts of some cases, without those whose damage is not in their structure."""
    texts = [file.read_text() for file in sorted(CASES.glob(pattern))]
    return [text for text in texts if not text.startswith("[[")]

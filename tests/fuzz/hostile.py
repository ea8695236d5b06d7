"""Hostile values, and how valid files are damaged with them: JSON by its structure, or any bytes.

A JSON text is a tree while it is damaged: an object is a `Pairs` (keys may repeat), an array a
list, any other value its own text. So it can hold what no JSON writer writes.
"""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from duo_jax.schema import checksums

LONG = 10**5
_NUMBERS = """
    0 1 -1 2 3 7 64 0.5 1.0 1.5 -0.0 1e-3 1e-9 1e-30 1e-40 5e-324 1e18 1e38 1e39 1e308 1e999 -1e999
    255 256 65536 1048576 2147483647 2147483648 -2147483648 4294967296 9223372036854775807
    9223372036854775808 -9223372036854775809 18446744073709551616 1E400 NaN Infinity -Infinity
""".split()
_TEXTS = [
    "",
    " ",
    "x",
    "0",
    "1.5",
    "null",
    "\ud800",
    "\udfff\ud800",
    "\0",
    "a\nb",
    "a\u2028b\x1b[2J",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "{name:>2000000000}",
    "{passkey}{passkey}",
    "{0.__class__}",
    "x" * 300,
    "x" * LONG,
    "ü" * 3_000,
]
_VALUES = [
    *_NUMBERS,
    *map(json.dumps, _TEXTS),
    *"true false null".split(),
    *"[] {} [1] [[]] [null] [0,1] [0.5,2] [true] [NaN]".split(),
    *['["x"]', '{"a":1}', '{"":{}}', '{"a":1,"a":2}', "[1e999]", '["\\ud800"]'],
    "9" * 5_000,
    "-" + "9" * 5_000,
    "0." + "9" * 5_000,
    "1" + "0" * 29,
    "1" + "0" * 90,
    "[" * 3_000 + "]" * 3_000,
    '{"a":' * 3_000 + "1" + "}" * 3_000,
    "[" * 3_000,
    "[" * 63 + "]" * 63,
    "[" + "0," * 50_000 + "0]",
    '{"' + "x" * LONG + '":' + "[1,2,3]" + "}",
    "x",
    "",
    "01",
    "'x'",
]
_KEYS = [*map(json.dumps, _TEXTS), "1", "x"]
_BYTES = [
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b"\x80",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b'"',
    b"[",
    b"\t",
]


class Pairs(list):
    """The keys, as JSON texts, and values of an object."""


def parse(text: str) -> Any:
    """Return the tree of a valid JSON text."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Pairs):
            return Pairs((json.dumps(key), leaf(inner)) for key, inner in value)
        return [leaf(inner) for inner in value] if isinstance(value, list) else json.dumps(value)

    return leaf(json.loads(text, object_pairs_hook=Pairs))


def written(tree: Any) -> str:
    """Return the text of a tree."""
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{key}: {written(value)}" for key, value in tree) + "}"
    return f"[{', '.join(map(written, tree))}]" if isinstance(tree, list) else tree


def values() -> st.SearchStrategy[str]:
    """Texts in the place of a JSON value, most of them hostile."""
    return st.one_of(
        st.sampled_from(_VALUES),
        st.sampled_from(_VALUES),
        st.integers(-(2**70), 2**70).map(str),
        st.floats().map(json.dumps),
        st.text(max_size=20).map(json.dumps),
    )


def json_texts(seeds: Sequence[str]) -> st.SearchStrategy[str]:
    """JSON texts, damaged at one to three places of their trees."""
    trees = [parse(seed) for seed in seeds]

    @st.composite
    def damaged(draw: st.DrawFn) -> str:
        tree = draw(st.sampled_from(trees))
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
            tree = _change(draw, tree)
        return written(tree)

    return damaged()


def json_files(seeds: Sequence[str]) -> st.SearchStrategy[bytes]:
    """JSON files, most damaged by structure, some in their bytes."""
    texts = json_texts(seeds).map(str.encode)
    return st.one_of(texts, texts, texts, damaged_bytes([seed.encode() for seed in seeds]))


def sealed(seeds: Sequence[str]) -> st.SearchStrategy[bytes]:
    """JSON objects, damaged by structure, then given their right checksum, as an attacker would."""
    return json_texts(seeds).map(seal)


def seal(text: str) -> bytes:
    """Return the text of a JSON object with its checksum."""
    content = text.removesuffix("}").encode()
    return content + b', "%b": "%b"}' % (
        checksums.KEY.encode(),
        checksums.of_bytes(content).encode(),
    )


def damaged_bytes(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Files with flipped bits, cuts, insertions and repeated blocks."""

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        content = draw(st.sampled_from(seeds))
        for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
            content = _damage(draw, content)
        return content

    return damaged()


def _change(draw: st.DrawFn, tree: Any) -> Any:
    """Return a tree with a change at one place."""
    if not isinstance(tree, list) or not tree or draw(st.integers(0, 15)) == 0:
        return draw(values())
    at = draw(st.integers(0, len(tree) - 1))
    before, item, after = tree[:at], tree[at], tree[at + 1 :]
    kind = type(tree)
    action = draw(st.sampled_from(["change"] * 7 + ["delete", "repeat", "key", "wrap", "swap"]))
    if action == "delete":
        return kind([*before, *after])
    if action == "repeat":
        return kind([*before, *[item] * draw(st.sampled_from([2, 2, 50])), *after])
    other = tree[draw(st.integers(0, len(tree) - 1))]
    if kind is not Pairs:
        new = {"wrap": [item], "swap": other}.get(action)
        return [*before, _change(draw, item) if new is None else new, *after]
    key, value = item
    if action == "key":
        new_key = draw(st.sampled_from([*_KEYS, other[0], key[:1] + "x" + key[1:]]))
        return Pairs([*before, (new_key, value), *after])
    new = {"wrap": [value], "swap": other[1]}.get(action)
    return Pairs([*before, (key, _change(draw, value) if new is None else new), *after])


def _damage(draw: st.DrawFn, content: bytes) -> bytes:
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    end = min(len(content), at + draw(st.sampled_from([1, 2, 8, 64, 1 << 20])))
    action = draw(st.sampled_from(["flip"] * 4 + ["cut", "delete", "insert", "repeat", "replace"]))
    if action == "cut" or not content:
        return content[:at]
    if action == "flip":
        flipped = content[at] ^ (1 << draw(st.integers(0, 7)))
        return content[:at] + bytes([flipped]) + content[at + 1 :]
    if action == "repeat":
        return content[:end] + content[at:end] * draw(st.sampled_from([1, 10])) + content[end:]
    inserted = b""
    if action != "delete":
        inserted = draw(st.sampled_from(_BYTES)) * draw(st.sampled_from([1, 1, 1, 300, LONG]))
    return content[:at] + inserted + content[at if action == "insert" else end :]

"""Types and ranges of files, dataclasses and arguments."""

import dataclasses
from typing import Literal

import msgspec
import numpy as np
import pytest

from duo_jax.errors import InputError
from duo_jax.schema.check import argument, check_fields, convert, replace
from duo_jax.schema.kinds import Count, Fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    share: Fraction = 0.5
    words: Literal["nato", "vocabulary"] = "nato"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    size: Count = 1
    names: tuple[str, ...] = ()
    maybe: float | None = None
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        check_fields(self)


class Header(msgspec.Struct):
    sizes: list[Count]
    parts: dict[str, Count] = {}


@pytest.mark.parametrize(
    ("values", "message"),
    {
        "another type": ({"sizes": [1, "2"]}, "f: sizes[1] is '2': expected a whole number"),
        "true": ({"sizes": [True]}, "f: sizes[0] is True: expected a whole number"),
        "out of range": ({"sizes": [0]}, "f: sizes[0] is 0: expected a whole number >= 1"),
        "missing": ({}, "f: object missing required field `sizes`"),
        "no object": ([], "f is []: expected an object"),
        "in a table": (
            {"sizes": [], "parts": {"x": -1}},
            "f, parts: expected a whole number >= 1",
        ),
        "long": ({"sizes": "x" * 10**6}, f"f: sizes is '{'x' * 79}...: expected a list"),
    }.values(),
)
def test_what_a_file_holds_is_refused_by_place(values, message):
    with pytest.raises(InputError) as error:
        convert(values, Header, "f")
    assert str(error.value) == message


def test_a_file_that_fits_becomes_its_type():
    header = convert({"sizes": [1, 2], "other": 1}, Header, "f")
    assert header == Header(sizes=[1, 2])


@pytest.mark.parametrize(
    ("values", "message"),
    {
        "another type": ({"size": "x"}, "f, size is 'x': expected a whole number"),
        "unknown": ({"sise": 1}, "f names 'sise'; known: size, names, maybe, inner"),
        "nested": ({"inner": {"share": 2}}, "f, inner, share is 2: expected a number <= 1.0"),
        "one of a list": ({"names": ["a", 1]}, "f, names: [1] is 1: expected a text"),
        "one of some words": (
            {"inner": {"words": "vocebulary"}},
            "f, inner, words is 'vocebulary': invalid enum value 'vocebulary'",
        ),
        "no object": ({"inner": 3}, "f, inner is 3, not a JSON object"),
    }.values(),
)
def test_a_preset_is_refused_by_field(values, message):
    with pytest.raises(InputError) as error:
        replace(Settings(), values, "f")
    assert str(error.value) == message


def test_a_preset_replaces_only_what_it_names():
    given = {"size": 3, "names": ["a"], "inner": {"share": 0}}
    assert replace(Settings(maybe=1.5), given, "f") == Settings(
        size=3, names=("a",), maybe=1.5, inner=Inner(share=0.0)
    )


@pytest.mark.parametrize(
    "size",
    [0, -1, 2**31, 1.0, "1", None, True, np.int64(0), -(1 << 10**5)],
    ids=lambda size: repr(size)[:20] if type(size) is not int else hex(size)[:20],
)
def test_a_dataclass_refuses_a_value_of_another_kind(size):
    with pytest.raises(InputError, match=r"^size .* is not a whole number from 1") as error:
        Settings(size=size)
    assert len(str(error.value)) < 200


def test_numpy_scalars_are_numbers():
    settings = Settings(size=np.int64(7), maybe=np.float32(0.5))  # pyright: ignore
    assert (settings.size, type(settings.size)) == (7, int)
    assert type(settings.maybe) is float
    assert argument("n", np.int32(3), Count) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", [0.5], 10**400])
def test_an_argument_is_a_finite_number(value):
    with pytest.raises(InputError, match=r"^x .* is not a (finite )?number"):
        argument("x", value, float)

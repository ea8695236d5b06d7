"""Rows of results that a killed run goes on with."""

import dataclasses

import pytest

from duo_jax.errors import InputError
from duo_jax.evaluate.results.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config:
    budgets: tuple[float, ...] = (0.5, 1.0)
    seed: int = 0
    batch: int = 8


def test_a_second_start_finds_the_rows_in_order(tmp_path):
    rows = Rows(tmp_path / "run", Config())
    rows.add("b", {"exact": 0.5, "sizes": (1, 2)})
    rows.add("a", {"exact": 1.0})
    again = Rows(tmp_path / "run", Config())
    assert "a" in again
    assert "c" not in again
    assert again.keys() == ["b", "a"]
    assert again.values() == rows.values() == [{"exact": 0.5, "sizes": [1, 2]}, {"exact": 1.0}]
    assert again["a"] == {"exact": 1.0}
    assert len(again) == 2


@pytest.mark.parametrize("left", [1, 12, -1])
def test_a_line_cut_short_is_measured_again(tmp_path, left):
    rows = Rows(tmp_path, Config())
    rows.add("a", {"exact": 1.0})
    before = (tmp_path / "rows.jsonl").read_bytes()
    rows.add("b", {"exact": 0.25, "name": "β"})
    line = (tmp_path / "rows.jsonl").read_bytes()[len(before) :]
    (tmp_path / "rows.jsonl").write_bytes(before + line[:left])
    again = Rows(tmp_path, Config())
    assert again.keys() == ["a"]
    again.add("b", {"exact": 0.5})
    assert Rows(tmp_path, Config()).values() == [{"exact": 1.0}, {"exact": 0.5}]


def test_another_config_is_refused_by_the_names_of_its_fields(tmp_path):
    Rows(tmp_path, Config())
    changed = Config(budgets=(0.5, 0.75), seed=1)
    with pytest.raises(
        InputError, match=r"budgets was \[0\.5, 1\.0\], is \[0\.5, 0\.75\]; seed was 0, is 1"
    ):
        Rows(tmp_path, changed)


def test_an_operational_field_may_change(tmp_path):
    Rows(tmp_path, Config(), operational=["batch"]).add("a", {})
    assert "a" in Rows(tmp_path, Config(batch=1), operational=["batch"])
    with pytest.raises(InputError, match="batch was 1, is 2"):
        Rows(tmp_path, Config(batch=2))


def test_a_key_is_added_once(tmp_path):
    rows = Rows(tmp_path, {"seed": 0})
    rows.add("a", {})
    with pytest.raises(ValueError, match="'a' has been added already"):
        rows.add("a", {})


def test_nan_is_no_result(tmp_path):
    rows = Rows(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="JSON compliant"):
        rows.add("a", {"exact": float("nan")})
    assert "a" not in Rows(tmp_path, {"seed": 0})


def test_a_damaged_line_is_set_aside_and_measured_again(tmp_path, capfd):
    rows = Rows(tmp_path, Config())
    for key in "abc":
        rows.add(key, {"exact": 1.0})
    file = tmp_path / "rows.jsonl"
    first, second, third = file.read_text().splitlines(keepends=True)
    damaged = second.replace("1.0", "0.0")  # still JSON, of the right types
    file.write_text(first + damaged + third)
    again = Rows(tmp_path, Config())
    assert again.keys() == ["a", "c"]
    [line] = [line for line in capfd.readouterr().err.splitlines() if "rows" in line]
    assert "measured again" in line
    assert file.read_text() == first + third
    assert (tmp_path / "rows.damaged.jsonl").read_text() == damaged
    again.add("b", {"exact": 1.0})
    assert len(Rows(tmp_path, Config())) == 3


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        Rows(tmp_path, Config())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

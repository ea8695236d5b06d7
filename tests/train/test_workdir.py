"""What becomes of a work folder whose checkpoints are damaged."""

import dataclasses
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.errors import InputError
from kernels import pytree
from tests.disk import full_disk
from tests.processes import without_plugin_log
from tests.training_state import state, workdir


@pytest.fixture
def folder(tmp_path):
    """Save two steps and the metrics of three."""
    work = workdir(tmp_path / "work")
    for step in (1, 2):
        work.save(state(step))
    work.metrics_file.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    work.close()
    return work.path


def damage(folder, step: int) -> None:
    files = [x for x in (folder / "checkpoints" / str(step)).rglob("*") if x.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-1] + b"?" * 7)


def test_the_latest_checkpoint_counts(folder):
    work = workdir(folder)
    restored = work.restore(state(0))
    np.testing.assert_array_equal(restored.gates, state(2).gates)
    assert [x["step"] for x in work.metrics()] == [1, 2]


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(folder, capfd):
    damage(folder, 2)
    work = workdir(folder)
    restored = work.restore(state(0))
    assert int(restored.step) == 1
    np.testing.assert_array_equal(restored.gates, state(1).gates)
    assert [x["step"] for x in work.metrics()] == [1]
    (line,) = (x for x in capfd.readouterr().err.splitlines() if "cannot be read" in x)
    assert line.startswith("the checkpoint of step 2 cannot be read (")
    assert any((folder / "damaged-checkpoint-2").iterdir())
    work.save(state(2))
    work.close()
    assert int(workdir(folder).restore(state(0)).step) == 2


def test_notes_that_orbax_cannot_read_are_removed(folder, capfd):
    notes = folder / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    notes.write_text(notes.read_text().replace('"init_', '"hnit_').replace('"item_', '"htem_'))
    work = workdir(folder)
    (line,) = (x for x in capfd.readouterr().err.splitlines() if "orbax' notes" in x)
    assert line.endswith("the arrays are checked by themselves")
    np.testing.assert_array_equal(work.restore(state(0)).gates, state(2).gates)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "notes",
    ["[]", '"x"', "5", "NaN", '{"item_handlers":5}', "[" * 3_000, "9" * 5_000, "null", "\0"],
    ids=lambda notes: notes[:20],
)
def test_no_notes_on_a_checkpoint_end_a_run(folder, capfd, notes):
    (folder / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_text(notes)
    work = workdir(folder)
    np.testing.assert_array_equal(work.restore(state(0)).gates, state(2).gates)
    work.save(state(3))
    work.close()
    lines = without_plugin_log(capfd.readouterr().err).splitlines()
    assert len(lines) <= 1
    assert int(workdir(folder).restore(state(0)).step) == 3


def test_what_a_killed_save_has_left_is_removed(folder):
    for name in ("3.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-1795694188"):
        shutil.copytree(folder / "checkpoints" / "2", folder / "checkpoints" / name)
    workdir(folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "2"]


def rename(checkpoints):
    (checkpoints / "2").rename(checkpoints / "8")


def copy(checkpoints):
    shutil.copytree(checkpoints / "2", checkpoints / "3")


@pytest.mark.parametrize(("change", "name", "left"), [(rename, "8", 1), (copy, "3", 2)])
def test_a_checkpoint_under_the_name_of_another_step_is_set_aside(
    folder, capfd, change, name, left
):
    """Or nothing would be saved before the run comes to the step of that name."""
    change(folder / "checkpoints")
    work = workdir(folder)
    assert int(work.restore(state(0)).step) == left
    (line,) = (x for x in capfd.readouterr().err.splitlines() if "cannot be read" in x)
    assert f"step {name} cannot be read (ValueError: it holds the state of step 2)" in line
    assert (folder / f"damaged-checkpoint-{name}").is_dir()
    work.save(state(left + 1))
    work.close()
    assert int(workdir(folder).restore(state(0)).step) == left + 1


def test_checkpoints_that_have_changed_places_are_refused(folder):
    checkpoints = folder / "checkpoints"
    for before, after in (("2", "x"), ("1", "2"), ("x", "1")):
        (checkpoints / before).rename(checkpoints / after)
    with pytest.raises(InputError, match=r"no checkpoint in .* it holds the state of step 1"):
        workdir(folder).restore(state(0))


def test_where_none_can_be_read_nothing_is_touched(folder):
    damage(folder, 1)
    damage(folder, 2)
    before = sorted(str(x) for x in folder.rglob("*"))
    work = workdir(folder)
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read \(.*\); with another"):
        work.restore(state(0))
    assert sorted(str(x) for x in folder.rglob("*")) == before
    assert [x["step"] for x in work.metrics()] == [1, 2, 3]


def test_checkpoints_of_another_state_are_not_damaged_ones(folder):
    @pytree.register
    @dataclasses.dataclass(frozen=True)
    class Larger:
        step: jax.Array
        gates: jax.Array
        velocity: jax.Array

    with pytest.raises(InputError, match="no checkpoint in"):
        workdir(folder).restore(Larger(**vars(state(0)), velocity=jnp.zeros(3)))
    assert int(workdir(folder).restore(state(0)).step) == 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [0, 60, 300])
def test_a_full_disk_is_one_line_and_the_next_start_goes_on(folder, capfd, caplog, size):
    capfd.readouterr()
    work = workdir(folder)
    with full_disk(size), pytest.raises(InputError, match="work cannot be written: File too large"):
        work.save(state(3))
    gc.collect()  # what orbax has left would complain now
    assert without_plugin_log(capfd.readouterr().err) == ""
    assert caplog.records == []  # outside pytest they would be printed
    work.close()
    work = workdir(folder)
    assert int(work.restore(state(0)).step) == 2
    work.save(state(3))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "3"]


def test_metrics_that_do_not_fit_are_left_out_whole(folder):
    work, before = workdir(folder), (folder / "metrics.jsonl").read_bytes()
    with full_disk(len(before) + 5), pytest.raises(InputError, match="jsonl cannot be written"):
        work.log({"step": 4, "loss": 1.0})
    assert work.metrics_file.read_bytes() == before

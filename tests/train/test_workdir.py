"""What becomes of a work folder whose checkpoints are damaged."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.errors import InputError
from kernels import pytree
from tests.disk import full_disk
from tests.processes import without_plugin_log
from train.workdir import WorkDir


@pytree.register
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    gates: jax.Array


def state(step: int) -> State:
    return State(step=jnp.int32(step), gates=jnp.full((2, 3), step, jnp.float32))


def workdir(path) -> WorkDir:
    return WorkDir(path, {"some": "settings"}, operational=())


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

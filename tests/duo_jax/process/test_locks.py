"""One process at a time writes an output or a work folder; what a killed one leaves goes."""

import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from duo_jax import files
from duo_jax.cli import workdir
from duo_jax.errors import InputError
from duo_jax.evaluate.results.rows import Rows
from duo_jax.process import locks

ROOT = pathlib.Path(__file__).parents[3]
IN_USE = "is in use by another process; wait until it has ended$"
# Writes both kinds of outputs, and stops in the middle of each.
WRITES = """
import pathlib, sys
from duo_jax import files

def stop(*_):
    print("writing", flush=True)
    sys.stdin.read()

with files.new_folder(sys.argv[1]) as folder:
    (folder / "half").mkdir()
    pathlib.Path.replace = stop
    files.write_text(sys.argv[2], "half")
"""


def listing(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def writer(tmp_path) -> Iterator[subprocess.Popen]:
    """Another process that is writing the folder "out" and the file "a.txt"."""
    command = [sys.executable, "-c", WRITES, tmp_path / "out", tmp_path / "a.txt"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_what_a_killed_one_left_is_removed(
    tmp_path, writer, monkeypatch
):
    monkeypatch.setattr(files, "_LONGEST_WAIT", 0.0)
    with pytest.raises(InputError, match=f"out {IN_USE}"), files.new_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    with pytest.raises(InputError, match=f"a.txt {IN_USE}"):
        files.write_text(tmp_path / "a.txt", "mine")
    left = listing(tmp_path)
    assert {".a.txt.partial", ".out.partial/half"} < set(left)

    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert listing(tmp_path) == left
    files.write_text(tmp_path / "a.txt", "mine")
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "mine").mkdir()
    assert listing(tmp_path) == ["a.txt", "out", "out/mine"]
    assert (tmp_path / "a.txt").read_text() == "mine"


def test_the_folder_that_a_killed_process_was_about_to_replace_is_put_back(tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").touch()
    with (
        pytest.raises(InputError, match="out already exists"),
        files.new_folder(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == ["out", "out/old"]


def test_an_output_that_appeared_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    acquire = locks.acquire

    def after_another(*args, **settings):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        return acquire(*args, **settings)

    monkeypatch.setattr(locks, "acquire", after_another)
    with pytest.raises(InputError, match="already exists"), files.new_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == ["out", "out/theirs"]


def test_a_file_waits_for_another_that_is_being_written(tmp_path):
    lock = locks.acquire(tmp_path / ".a.lock", tmp_path / "a")
    timer = threading.Timer(0.1, locks.remove, [lock])
    timer.start()
    files.write_text(tmp_path / "a", "mine")
    timer.join()
    assert listing(tmp_path) == ["a"]


def test_a_lock_file_may_be_removed_while_others_want_it(tmp_path):
    """Many write the same file: never two at once, and nothing is left."""
    writing, most = [], []

    def write() -> None:
        for _ in range(10):
            lock = locks.acquire(tmp_path / "lock", tmp_path, wait=30.0)
            writing.append(1)
            most.append(len(writing))
            time.sleep(0.0005)
            writing.pop()
            locks.remove(lock)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 30
    assert listing(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_outputs_are_written_without(
    tmp_path, monkeypatch, code
):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    files.write_text(tmp_path / "a.txt", "mine")
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "mine").mkdir()
    workdir.claim(tmp_path / "run", {"seed": 0})
    assert listing(tmp_path) == ["a.txt", "out", "out/mine", "run", "run/config.json"]


def test_a_work_folder_belongs_to_one_process_until_that_forgets_it(tmp_path):
    rows = Rows(tmp_path, {"seed": 0})
    again = Rows(tmp_path, {"seed": 0})  # the same process may
    del rows
    with pytest.raises(InputError, match=IN_USE):
        locks.acquire(tmp_path / ".lock", tmp_path)  # as another process does
    del again
    other = locks.acquire(tmp_path / ".lock", tmp_path)
    with pytest.raises(InputError, match=IN_USE):
        Rows(tmp_path, {"seed": 0})
    del other
    Rows(tmp_path, {"seed": 0}).add("a", {"x": 1})
    with pytest.raises(InputError, match="another configuration"):
        Rows(tmp_path, {"seed": 1})


def test_a_lock_that_a_killed_process_left_makes_no_folder_anothers(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.partial").touch()
    workdir.check(tmp_path, {"seed": 0})
    workdir.claim(tmp_path, {"seed": 0})
    assert listing(tmp_path) == [".lock", "config.json"]

"""Outputs that appear only when they are complete, and one clear line for what cannot be."""

import errno
import os
import pathlib

import pytest

from duo_jax import files
from duo_jax.errors import InputError
from tests.disk import full_disk


def listing(folder: pathlib.Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fill(path: pathlib.Path, *, then_raise: type[BaseException], replace: bool) -> None:
    with files.new_folder(path, replace=replace) as partial:
        (partial / "new.txt").write_text("new")
        raise then_raise


def test_folder_appears_only_when_the_block_has_ended(tmp_path):
    path = tmp_path / "deep" / "er" / "out"
    with files.new_folder(path) as partial:
        (partial / "a.txt").write_text("a")
        assert not path.exists()
        assert partial.parent == path.parent  # one file system, so that the rename is atomic
    assert (path / "a.txt").read_text() == "a"
    assert listing(path.parent) == ["out", "out/a.txt"]


@pytest.mark.parametrize("exception", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("replace", [False, True])
def test_nothing_is_left_after_an_exception(tmp_path, exception, replace):
    with pytest.raises(exception):
        fill(tmp_path / "out", then_raise=exception, replace=replace)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_a_folder_is_for_whom_the_umask_leaves_it_and_keeps_what_it_was_given(
    tmp_path, umask, mode
):
    path, other = tmp_path / "saved", tmp_path / "other"
    other.touch(0o400)
    before = os.umask(umask)
    try:
        with files.new_folder(path) as partial:
            assert partial.stat().st_mode & 0o777 == 0o700
            (partial / "inner").mkdir()
            (partial / "inner/file").touch(0o600)
            (partial / "link").symlink_to(other)
        assert path.stat().st_mode & 0o777 == mode
        assert (path / "inner").stat().st_mode & 0o777 == mode
        assert (path / "inner/file").stat().st_mode & 0o777 == mode & 0o666
        assert other.stat().st_mode & 0o777 == 0o400
        path.chmod(0o750)
        with files.new_folder(path, replace=True):
            pass
        assert path.stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)


def test_an_existing_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with (
        pytest.raises(InputError, match="already exists; remove it or choose another name"),
        files.new_folder(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == ["out", "out/mine.txt"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with files.new_folder(tmp_path / "out") as partial:
        (partial / "a.txt").write_text("a")
    assert listing(tmp_path) == ["out", "out/a.txt"]


def test_replacing_takes_the_old_folder_away_only_at_the_end(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with files.new_folder(tmp_path / "out", replace=True) as partial:
        (partial / "new.txt").write_text("new")
        assert (tmp_path / "out" / "old.txt").exists()
    assert listing(tmp_path) == ["out", "out/new.txt"]


def test_an_exception_leaves_the_folder_that_was_to_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(RuntimeError):
        fill(tmp_path / "out", then_raise=RuntimeError, replace=True)
    assert listing(tmp_path) == ["out", "out/old.txt"]


def test_a_failed_exchange_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    rename = pathlib.Path.rename

    def fail_for_the_new_one(self, target):
        if (self / "new.txt").exists():
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_for_the_new_one)
    with (
        pytest.raises(InputError, match="cannot be written: No space left"),
        files.new_folder(tmp_path / "out", replace=True) as partial,
    ):
        (partial / "new.txt").write_text("new")
    assert listing(tmp_path) == ["out", "out/old.txt"]


@pytest.mark.parametrize("replace", [False, True])
def test_where_no_folder_can_be_is_one_clear_line(tmp_path, monkeypatch, replace):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    places = {
        "file": "is a file; an output folder is needed",
        "file/out": "cannot be written",
        "dangling": "cannot be written",
        "/dev/null/out": "cannot be written",
        "/proc/out": "cannot be written",
    }
    for place, message in places.items():
        with (
            pytest.raises(InputError, match=message) as error,
            files.new_folder(place, replace=replace),
        ):
            pass
        assert "\n" not in str(error.value)
    assert listing(tmp_path) == ["dangling", "file"]


@pytest.mark.parametrize("check", [files.check_file, files.check_new_folder, files.check_place])
def test_a_place_is_tried_before_there_is_something_to_write(tmp_path, check):
    (tmp_path / "file").touch()
    # What the kernel makes up takes nothing, though the system tells root that it does.
    assert os.access("/proc", os.W_OK) or os.getuid()
    for place in (tmp_path / "file" / "out", "/proc/out", tmp_path / ("o" * 256)):
        with pytest.raises(InputError, match=r"cannot be (written|read: File name)"):
            check(place)
    with pytest.raises(InputError, match="holds characters that no file's name can hold"):
        check(tmp_path / "a\0b")
    check(tmp_path / "out")
    assert listing(tmp_path) == ["file"]


def test_the_current_folder_is_refused_and_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be written"), files.new_folder("."):
        pass
    assert tmp_path.is_dir()
    assert listing(tmp_path) == []


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "report.md"
    for text in ("first, and longer", "second — ünlike"):
        files.write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert listing(tmp_path) == ["report.md"]


def test_a_link_and_the_mode_of_a_file_stay(tmp_path):
    real, link = tmp_path / "real.md", tmp_path / "link.md"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o600
    assert listing(tmp_path) == ["link.md", "real.md"]


def test_a_failed_write_leaves_the_old_text_and_nothing_else(tmp_path):
    path = tmp_path / "report.md"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["report.md"]


def test_text_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a", tmp_path / "no" / "a", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot be written"):
            files.write_text(path, "x")
    with full_disk(10), pytest.raises(InputError, match="b cannot be written: File too large"):
        files.write_text(tmp_path / "b", "x" * 11)
    assert listing(tmp_path) == ["file", "folder"]


FULL = OSError(errno.ENOSPC, "No space left on device")
QUOTED = {
    "safetensors": "Error while serializing: I/O error: No space left on device (os error 28)",
    "tensorstore": "ENOSPC [source locations='...'] [os_error_code='28']",
}


@pytest.mark.parametrize(
    "error", [FULL, *map(ValueError, QUOTED.values())], ids=["the system", *QUOTED]
)
def test_a_full_disk_is_one_clear_line_wherever_it_is_met(tmp_path, error):
    message = "out cannot be written: No space left on device$"
    with pytest.raises(InputError, match=message), files.writing(tmp_path / "out"):
        raise error
    with pytest.raises(InputError, match=message), files.new_folder(tmp_path / "out"):
        raise error
    assert listing(tmp_path) == []


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no"), ValueError("x"), InputError("x")])
def test_an_error_of_our_own_stays_what_it_is(tmp_path, error):
    """A file that a block expects and does not find says nothing about the folder it makes."""
    with pytest.raises(type(error)) as raised, files.new_folder(tmp_path / "out"):
        raise error
    assert raised.value is error


def test_text_is_appended_or_one_clear_line(tmp_path):
    for text in ("a\n", "ü\n"):
        files.append_text(tmp_path / "log", text)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "a\nü\n"
    with pytest.raises(InputError, match="log cannot be written: Not a directory"):
        files.append_text(tmp_path / "log" / "log", "x")
    with pytest.raises(InputError, match="full cannot be written: No space left on device"):
        files.append_text("/dev/full", "x")


def test_text_that_does_not_fit_is_not_appended_in_part(tmp_path):
    (tmp_path / "log").write_text("first\n")
    with full_disk(10), pytest.raises(InputError, match="log cannot be written: File too large"):
        files.append_text(tmp_path / "log", "second\n")
    assert (tmp_path / "log").read_text() == "first\n"


def test_folders_are_made_with_their_parents_or_one_clear_line(tmp_path):
    for _ in range(2):
        files.make_folder(tmp_path / "a" / "b")
    assert listing(tmp_path) == ["a", "a/b"]
    with pytest.raises(InputError, match="null/a cannot be written: Not a directory"):
        files.make_folder("/dev/null/a")


def test_what_is_there(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, kinds in {
        "file": (True, True, False),
        "link": (True, True, False),
        ".": (True, False, True),
        "dangling": (False, False, False),
        "file/below": (False, False, False),
        "a\0b": (False, False, False),
    }.items():
        path = tmp_path / name
        assert (files.exists(path), files.is_file(path), files.is_folder(path)) == kinds
    for name in ("x" * 5000, "x" * 300):
        with pytest.raises(
            InputError,
            match=r"^x{200}\.\.\. .*: File name too long$",
        ):
            files.is_folder(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_one_clear_line(tmp_path):
    tmp_path.chmod(0o555)
    with (
        pytest.raises(InputError, match="cannot be written: Permission denied"),
        files.new_folder(tmp_path / "out"),
    ):
        pass
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        files.write_text(tmp_path / "a", "x")


def test_a_current_folder_that_was_removed_is_said(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError, match=r"^a\.txt: the current folder was removed$"):
        files.write_text("a.txt", "")
    assert files.absolute(tmp_path) == tmp_path

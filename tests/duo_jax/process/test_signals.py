"""Ctrl-C and SIGTERM: cleaned up after, said in one line, never lost."""

import contextlib
import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from duo_jax import files
from duo_jax.process import locks, signals
from tests.processes import without_plugin_log

pytestmark = pytest.mark.usefixtures("signals_of_a_terminal")
ROOT = pathlib.Path(__file__).parents[3]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAINS = ("duo_jax.generate", "duo_jax.plan", "duo_jax.evaluate", "convert")
MAINS += ("train.identify", "train.demo_model")


def ended(command: Callable[[], None]) -> int:
    """Return the exit code of a command, and check that nothing of it stays behind."""
    handlers = [signal.getsignal(number) for number in _SIGNALS]
    hook = sys.unraisablehook
    with pytest.raises(SystemExit) as exit_:
        signals.run(command)
    assert [signal.getsignal(number) for number in _SIGNALS] == handlers
    assert sys.unraisablehook is hook
    return exit_.value.code


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "terminal closed"),
    ],
)
def test_a_signal_ends_a_command_in_one_line_after_its_cleanup(capsys, number, code, line):
    done = []

    def command() -> None:
        try:
            signal.raise_signal(number)
            done.append("went on")
        finally:
            done.append("cleaned up")

    assert ended(command) == code
    assert done == ["cleaned up"]
    assert capsys.readouterr().err == f"{line}\n"


went_on: list[str] = []  # commands that ran beyond their interruption


def turned_into_another_error() -> None:
    try:
        interrupt()
    except KeyboardInterrupt:
        raise ValueError("INTERNAL: a callback failed") from None


def swallowed() -> None:
    with contextlib.suppress(BaseException):
        interrupt()


def swallowed_in_a_loop() -> None:
    for _ in range(3):
        swallowed()
        signals.check()
    went_on.append("the loop")


def in_a_callback_of_jax() -> None:
    def callback(x: jax.Array) -> jax.Array:
        interrupt()
        return x

    result = jax.ShapeDtypeStruct((), jnp.float32)
    jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(callback, result, x))(1.0))
    went_on.append("after a callback of jax")


class _Deleted:
    def __del__(self) -> None:
        interrupt()


def _wait() -> None:
    time.sleep(10)
    went_on.append("after a signal that Python dropped")


def dropped_in_del() -> None:
    _Deleted()
    _wait()


def dropped_in_a_weak_reference() -> None:
    target = threading.Event()
    kept = weakref.ref(target, lambda _: interrupt())
    del target
    _wait()
    del kept


def dropped_while_collecting_garbage() -> None:
    def callback(*_: object) -> None:
        gc.callbacks.remove(callback)
        interrupt()

    gc.callbacks.append(callback)
    gc.collect()
    _wait()


@pytest.mark.parametrize(
    "command",
    [
        turned_into_another_error,
        swallowed,
        swallowed_in_a_loop,
        in_a_callback_of_jax,
        dropped_in_del,
        dropped_in_a_weak_reference,
        dropped_while_collecting_garbage,
    ],
    ids=lambda command: command.__name__,
)
def test_a_signal_is_never_lost(capfd, caplog, command):
    assert ended(command) == 130
    assert went_on == []
    assert caplog.records == []  # outside pytest they would be printed
    assert without_plugin_log(capfd.readouterr().err) == "interrupted\n"


def test_without_a_signal_everything_passes_through():
    done = []
    signals.run(lambda: done.append(1))
    assert done == [1]
    error = ValueError("a bug")

    def fail() -> None:
        raise error

    with pytest.raises(ValueError, match="a bug") as raised:
        signals.run(fail)
    assert raised.value is error
    signals.check()


def test_a_signal_of_an_earlier_command_is_forgotten():
    assert ended(interrupt) == 130
    signals.check()
    signals.run(signals.check)


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signals.run(interrupt)
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_a_command_runs_without_signals():
    done = []
    thread = threading.Thread(target=lambda: signals.run(lambda: done.append(1)))
    thread.start()
    thread.join()
    assert done == [1]


def test_signals_wait_for_a_block_that_puts_them_off():
    done = []

    def command() -> None:
        with signals.put_off():
            with signals.put_off():
                interrupt()
            done.append("block")
        done.append("after it")

    assert ended(command) == 130
    assert done == ["block"]


def test_inside_of_such_a_block_they_can_be_let_through():
    done = []

    def command() -> None:
        with signals.put_off():
            try:
                interrupt()
                done.append("before")
                with signals.let_through():
                    done.append("inside")
            finally:
                interrupt()
                done.append("cleanup")

    assert ended(command) == 130
    assert done == ["before", "cleanup"]


def test_waiting_for_another_process_that_writes_can_be_interrupted(tmp_path):
    other = locks.acquire(tmp_path / ".text.lock", tmp_path / "text")
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    assert ended(lambda: files.write_text(tmp_path / "text", "new")) == 130
    assert time.monotonic() - start < 5
    locks.remove(other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [True, False])
def test_a_first_signal_waits_for_the_step(asked):
    done = []

    def command() -> None:
        with signals.between_steps() as step_done:
            interrupt()
            done.append("step")
            if asked:
                step_done()
                done.append("next step")
        done.append("after it")

    assert ended(command) == 130
    assert done == ["step"]


def test_a_second_signal_does_not_wait_but_an_echo_of_the_first_does(monkeypatch):
    done = []

    def command() -> None:
        with signals.between_steps():
            interrupt()
            interrupt()  # as timeout(1) does
            done.append("step")
            monkeypatch.setattr(signals, "_ONE", 0.0)
            interrupt()
            done.append("the rest of it")

    assert ended(command) == 130
    assert done == ["step"]


@pytest.mark.parametrize("replace", [False, True])
def test_an_output_is_whole_or_not_there_wherever_a_signal_comes(tmp_path, replace):
    """Signals come later and later, until ten commands have ended before theirs."""
    out, codes, times = tmp_path / "out", [], []

    def write() -> None:
        with files.new_folder(out, replace=replace) as folder:
            (folder / "a").mkdir()
            (folder / "b").mkdir()

    def on_alarm(*_: object) -> None:
        if signal.getsignal(signal.SIGINT) is signals._on_signal:  # inside of `run`
            interrupt()

    def clear() -> None:
        if not replace:
            shutil.rmtree(out, ignore_errors=True)

    for _ in range(5):
        started = time.perf_counter()
        signals.run(write)
        times.append(time.perf_counter() - started)
        clear()
    step = sorted(times)[2] / 40
    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        for steps in range(1, 601):
            if codes.count(0) == 10:  # their signals would have come later
                break

            def command(after: float = steps * step) -> None:
                signal.setitimer(signal.ITIMER_REAL, after)
                write()

            try:
                signals.run(command)
                codes.append(0)
            except SystemExit as end:
                codes.append(end.code)
            signal.setitimer(signal.ITIMER_REAL, 0)
            left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
            assert left in ([], ["out", "out/a", "out/b"])
            clear()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert codes.count(130) > 10
    assert codes.count(0) > 0


def test_a_signal_interrupts_what_fills_an_output_at_once(tmp_path):
    done = []

    def command() -> None:
        with files.new_folder(tmp_path / "out"):
            interrupt()
            done.append("went on")

    assert ended(command) == 130
    assert done == []
    assert list(tmp_path.iterdir()) == []


IMPORTING = """
import sys
for module in {MAINS}:
    __import__(module.removesuffix(".generate"))
from duo_jax.process import signals, startup
assert "jax" not in sys.modules
startup.begin()
print("ready", flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("number", "code", "line", "then"),
    [
        (signal.SIGINT, 130, b"interrupted\n", "import time; time.sleep(60)"),
        (signal.SIGTERM, 143, b"terminated\n", "signals.run(lambda: sys.stdin.read())"),
    ],
    ids=["importing", "running"],
)
def test_a_process_ends_in_one_line_before_jax_is_imported_and_later(number, code, line, then):
    """The packages that Python imports before a command's module have not imported jax."""
    script = IMPORTING.format(MAINS=MAINS, then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.05)  # for the second: into `run`
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == line
    assert process.returncode == code


@pytest.mark.parametrize("module", MAINS)
def test_a_command_asks_for_that_before_it_imports_anything(module):
    file = ROOT / pathlib.Path(*module.split("."))
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    _, _, after_docstring = file.read_text().split('"""', maxsplit=2)
    first = 'if __name__ == "__main__":'
    assert after_docstring.lstrip().startswith(first)
    assert "startup.begin()" in after_docstring.split("\n\n\n")[0]


@pytest.mark.parametrize("closed", ["", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed, tmp_path):
    """What jaxlib logs to stderr would be written into it."""
    code = "from duo_jax.process import startup; startup.begin(); import os, sys; "
    code += "file = open(sys.argv[1], 'w'); file.write(str(file.fileno())); os.write(2, b'a line')"
    command = f'"{sys.executable}" -c "{code}" "{tmp_path}/file" {closed}'
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert int((tmp_path / "file").read_text()) > 2

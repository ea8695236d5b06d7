"""Ctrl-C (SIGINT), SIGTERM and SIGHUP: a command cleans up, says so, and ends with 128 + signal.

SIGHUP comes when a terminal is closed, or a connection to another machine ends.

A signal becomes a KeyboardInterrupt, as Ctrl-C always does. But Python may lose that: jax turns one
that comes inside a callback into an error of its own, and Python drops one that comes while it
collects garbage. So the signal is also remembered until the command has ended.

Outside of `run`, as in somebody's notebook, nothing here changes how signals are handled.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

_WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):  # not on Windows
    _WORDS[signal.SIGHUP] = "terminal closed"
_ONE = 0.5  # seconds within which several signals are one: timeout(1) sends each twice
_AGAIN = 0.01  # seconds until a signal that Python dropped is sent again


class _State:
    """What is known of this process's signals. Only `run` makes any come here."""

    is_process: bool = False  # the command is all that this process does
    received: int | None = None  # the first
    at: float = 0.0  # when the latest came
    due: bool = False  # one waits until nothing holds it back
    patient: bool = False  # ... and it is the first, which a step may hold back
    held: int = 0  # blocks that hold all back
    steps: int = 0  # blocks that hold back the first


_state = _State()


def run(command: Callable[[], None]) -> None:
    """Call a function; if a signal ended it, or came meanwhile, end the process.

    Whatever exception the signal has become, and even if it was swallowed.

    Raises:
      SystemExit: a signal came; 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    before: dict[int, Any] = {}
    hook, silenced = sys.unraisablehook, logging.root.manager.disable
    _reset(held=1)
    ended_by = None
    try:
        try:
            if _in_main_thread():  # Python handles signals nowhere else
                for number in _WORDS:
                    handler = signal.getsignal(number)
                    # Ignored: as nohup does, and `&` in a script. None: handled by other code.
                    if handler not in (signal.SIG_IGN, None):
                        before[number] = handler
                        signal.signal(number, _on_signal)
                sys.unraisablehook = _send_again_or(hook)
            _state.held = 0
            _deliver()
            command()
        finally:
            _state.held = 1  # nothing may interrupt what follows; no signal comes before this
    except BaseException as error:
        if not is_interruption(error):
            raise
        ended_by = signal.SIGINT
    finally:
        sys.unraisablehook = hook
        logging.disable(silenced)
        for number, handler in before.items():
            signal.signal(number, handler)
        received = _state.received
        _reset(held=0)
    ended_by = received or ended_by
    if ended_by is not None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(_WORDS[ended_by], file=sys.stderr)
        _end(ended_by)


def end_at_once() -> None:
    """Have signals end the process until `run` is called: nothing is to be cleaned up yet.

    For the first line of what is the process's main module: jax takes seconds to import.
    """
    _state.is_process = True
    for number in _WORDS:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _on_early_signal)


def is_interruption(error: BaseException) -> bool:
    """Whether an exception is a signal, or comes while one is on its way."""
    return isinstance(error, KeyboardInterrupt) or _state.received is not None


def check() -> None:
    """Raise the signal that came, if the code that it interrupted has swallowed it.

    For loops, and for where any exception is taken for a user's damaged file.

    Raises:
      KeyboardInterrupt: a signal came.
    """
    if _state.received is not None:
        _state.due = False
        raise KeyboardInterrupt


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Put signals off until the block has ended, such as one that cleans up or saves."""
    if not _in_main_thread():
        yield
        return
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
        _deliver()


@contextlib.contextmanager
def let_through() -> Iterator[None]:
    """Inside of `put_off`, let signals interrupt a block."""
    if not _in_main_thread():
        yield
        return
    _state.held -= 1
    try:
        _deliver()
        yield
    finally:
        _state.held += 1


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Put a first signal off until the yielded function is called; a second one acts at once."""
    _state.steps += 1
    try:
        yield check
    finally:
        _state.steps -= 1
        _deliver()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _reset(*, held: int) -> None:
    _state.received, _state.due, _state.patient = None, False, False
    _state.held, _state.steps = held, 0


def _on_signal(number: int, frame: FrameType | None) -> None:
    del frame
    first, now = _state.received is None, time.monotonic()
    if not first and now - _state.at < _ONE:
        return
    _state.received, _state.at = _state.received or number, now
    _state.due, _state.patient = True, first
    logging.disable()  # jax and asyncio log what they make of it, with tracebacks
    _deliver()


def _deliver() -> None:
    waits = _state.held > 0 or (_state.patient and _state.steps > 0)
    if _state.due and not waits:
        _state.due = False
        raise KeyboardInterrupt


def _send_again_or(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Return a hook for exceptions that Python drops: a signal among them is sent again."""

    def dropped(unraisable: Any) -> None:
        if _state.received is None or not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        timer = threading.Timer(_AGAIN, _send_again)
        timer.daemon = True
        timer.start()

    return dropped


def _send_again() -> None:
    number, main = _state.received, threading.main_thread().ident
    if number is not None and main is not None and signal.getsignal(number) is _on_signal:
        _state.at = 0.0  # so that it is not taken for a part of the first
        signal.pthread_kill(main, number)


def _on_early_signal(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    with contextlib.suppress(OSError):
        os.write(2, f"{_WORDS[number]}\n".encode())
    os._exit(128 + number)


def _end(number: int) -> NoReturn:
    """End the process; if something else called the command, by an exception."""
    if not _state.is_process:
        sys.exit(128 + number)
    # A compilation that was interrupted goes on in jax' threads. Python's own end would wait for
    # them and then crash.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed before this process began
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(128 + number)

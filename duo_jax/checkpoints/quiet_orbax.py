"""Orbax without what it prints of errors that it also raises."""

import asyncio
import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

_COMPLAINING = ("absl", "asyncio")  # loggers, of what is raised as well
_LONGEST_WAIT = 30.0  # seconds for orbax' threads to end after an error


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep orbax from printing errors that it also raises, and from working on after one.

    It logs warnings and tracebacks, its threads also after the block has failed: they are waited
    for. It ends its event loops at the first error of many; tasks that are left would go on
    writing, and complain that their loop is closed. So its loops end when their tasks have.
    """
    before = set(threading.enumerate())
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in _COMPLAINING}
    modules = [sys.modules[name] for name in ("asyncio", "uvloop") if name in sys.modules]
    makers = [module.new_event_loop for module in modules]
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    for module in modules:
        vars(module)["new_event_loop"] = _PatientLoop
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    except Exception:
        for thread in set(threading.enumerate()) - before:
            if type(thread).__module__.startswith("orbax."):
                thread.join(_LONGEST_WAIT)
        raise
    finally:
        for module, maker in zip(modules, makers, strict=True):
            vars(module)["new_event_loop"] = maker
        for logger, level in levels.items():
            logger.setLevel(level)


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that closes when its tasks have ended, with whatever errors: they are raised.

    It logs nothing of a task whose error nobody has asked for, which may be found much later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_exception_handler(lambda *_: None)

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.wait(tasks, timeout=_LONGEST_WAIT))
        super().close()

"""Rendering of chat templates, which nobody has checked, within bounds.

They are rendered in a process of their own (`chat_template_process`). One operation of Python's can
take all memory or run for years, such as `10 ** 10 ** 10`, and nothing in the same process stops
it; the system can limit another process, and this one can end it. It starts with the first
rendering, serves the later ones, and ends with this process, however that ends.
"""

import atexit
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from duo_jax.checkpoints.chat_template_files import LONGEST_TEMPLATE
from duo_jax.errors import InputError
from duo_jax.session import chat_template_process

_OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "  # the mark, and the space, of transformers
_NO_MESSAGES = "the chat has no messages"
_READY = b"ready\n"
_PART = 8  # of its memory that a request may take: it is read, parsed, joined and written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """What one rendering may take.

    Attributes:
      seconds: time, by the clock on the wall.
      memory: bytes, of the process that renders. Linux holds this; macOS and Windows do not.
      characters: of text, beside four for each byte of the template and the messages.
    """

    seconds: float = 5.0
    memory: int = 2**30
    characters: int = 2**20


class Renderer:
    """Renders templates in a process that starts when it is needed; threads take turns."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._bounds = bounds or Bounds()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # id of the process that started it

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Return what a template writes.

        Args:
          template: in Jinja, as transformers' apply_chat_template takes it.
          variables: what it sees: "messages" and others, of the types that JSON has.

        Raises:
          InputError: the template refuses these variables, is broken, or goes beyond a bound.
        """
        if len(template) > LONGEST_TEMPLATE:
            raise InputError(
                f"the model's chat template has {len(template):,} characters; at most "
                f"{LONGEST_TEMPLATE:,} are accepted"
            )
        text = json.dumps({"template": template, "variables": variables}, ensure_ascii=False)
        request = text.encode("utf-8", "surrogatepass") + b"\n"
        most = self._bounds.memory // _PART
        if len(request) > most:
            raise InputError(
                f"the chat has {len(request):,} bytes; at most {most:,} go through a template"
            )
        with self._lock:
            try:
                reply = self._ask(request)
            except BaseException:  # as after Ctrl-C: the next request would get this one's answer
                self.close()
                raise
            if "bound" in reply:
                self.close()
        if "bound" in reply:
            raise InputError(f"the model's chat template {reply['bound']}, and was stopped")
        if "refused" in reply:
            raise InputError(f"the model's chat template refuses this: {reply['refused']}")
        return reply["text"]

    def close(self) -> None:
        """End the process, if there is one; the next rendering starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        with contextlib.suppress(OSError), process:  # OSError: it did not read all of a request
            pass

    def _ask(self, request: bytes) -> dict[str, str]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        # Python writes a character in JSON with six bytes at most.
        most = 6 * chat_template_process.most_characters(self._bounds.characters, len(request))
        timer = threading.Timer(self._bounds.seconds, end)
        try:
            timer.start()
            with contextlib.suppress(OSError):  # it is dead, as the empty answer shows
                process.stdin.write(request)
                process.stdin.flush()
            line = process.stdout.readline(most + 1000)
        finally:
            timer.cancel()
            if timer.is_alive():  # it might yet end a process that has answered
                timer.join()
        if line.endswith(b"\n") and not late.is_set():
            return json.loads(line.decode("utf-8", "surrogatepass"))
        if not line and not late.is_set():
            process.wait()  # for its own exit code
        self.close()
        code = process.returncode
        if late.is_set() or (code < 0 and code == -signal.SIGXCPU):
            return {"bound": f"takes longer than {self._bounds.seconds:g} s"}
        if code < 0:
            return {"bound": f"crashes the process that renders it (signal {-code})"}
        raise RuntimeError(f"the process that renders chat templates ended with code {code}")

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process, started if there is none; after a fork, the parent keeps its own."""
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._process
            self.close()
        # Isolated, and without what site-packages runs at every start.
        command = [sys.executable, "-I", "-S", chat_template_process.__file__]
        command += [json.dumps(dataclasses.asdict(self._bounds))]
        command += _folders("jinja2", "markupsafe")
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is not for it
        )
        self._process, self._owner = process, os.getpid()
        assert process.stdout is not None
        if process.stdout.readline() != _READY:
            self.close()
            raise RuntimeError(
                "the process that renders chat templates did not start "
                f"(exit code {process.returncode}): {' '.join(command)}"
            )
        return process


_RENDERER = Renderer()  # one for all models of this process
atexit.register(_RENDERER.close)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """Return a chat as a model's template writes it.

    Args:
      template: as in `Renderer.render`.
      messages: roles and contents.
      variables: what the template sees beside them.

    Raises:
      InputError: as `Renderer.render`; or there are no messages.
    """
    if not messages:
        raise InputError(_NO_MESSAGES)
    return _RENDERER.render(template, {"messages": list(messages), **variables})


def render_open(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """Return a chat that ends within its last message, for the model to continue it.

    The arguments are those of `render`.

    Raises:
      InputError: as `render`; or the template leaves the last message out.
    """
    if not messages:
        raise InputError(_NO_MESSAGES)
    *others, last = messages
    content = last["content"]
    text = render(template, [*others, {**last, "content": content + _OPEN_END}], variables)
    end = text.rfind(_OPEN_END.strip())
    if end < 0 or content.strip() not in text:
        raise InputError("the model's chat template does not show the message to continue")
    # A template that trims the message has taken the mark's space, and would take the message's.
    return text[:end] if text.startswith(_OPEN_END, end) else text[:end].rstrip()


def _folders(*packages: str) -> list[str]:
    """Return the folders in which Python finds packages, without importing them."""
    found = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package}, which renders chat templates, is not installed")
        found.append(str(pathlib.Path(spec.origin).parents[1]))
    return list(dict.fromkeys(found))

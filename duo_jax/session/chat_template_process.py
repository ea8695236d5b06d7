"""The process in which chat templates are rendered; `chat_template` starts it by its path.

Nobody has checked the template that comes with a model. In jinja2's sandbox it reaches nothing
outside, but a line of it can take all memory or run for years, in one operation of Python's that
nothing inside the process can stop. So this process has limits of its own, and its parent ends it.

It starts in less than 0.1 s, because it imports jinja2 and the standard library alone. It answers
one line of JSON with one line of JSON until its input ends, as it does when its parent dies.
"""

import contextlib
import datetime
import functools
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

try:
    import resource
except ImportError:  # Windows: only the parent's clock and the length of a text are bounds there
    resource = None

# A chat is written out once, between marks. Characters per character of the request.
_WRITTEN_PER_READ = 4
_LONGEST_REFUSAL = 300  # characters of what a template says when it refuses a chat


def most_characters(free: int, request: int) -> int:
    """Return how many characters a template may write for a request of so many bytes."""
    return free + _WRITTEN_PER_READ * request


def main() -> None:
    """Serve the parent: argv holds the bounds, then the folders of jinja2 and what it needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    bounds = json.loads(sys.argv[1])
    sys.path += sys.argv[2:]  # last: nothing there may stand for a module of Python's own
    compiled = functools.lru_cache(maxsize=4)(environment().from_string)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_AS", bounds["memory"])
    _send(b"ready\n")
    for line in sys.stdin.buffer:
        # The parent's clock strikes first, unless the parent is dead.
        _limit("RLIMIT_CPU", int(time.process_time() + bounds["seconds"]) + 2)
        _send(_reply(compiled, line, bounds))


def environment() -> Any:
    """Return a jinja2 environment with the settings of transformers' apply_chat_template."""
    from jinja2 import exceptions, ext, nodes, sandbox, utils  # found once sys.path is set

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's words, for training; here it shows its body."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

        def _show(self, caller: Callable[[], str]) -> str:
            return caller()

    class Dict:
        """Makes dicts, without the attributes of the type itself."""

        def __call__(self, *args: Any, **values: Any) -> dict:
            return dict(*args, **values)

        def fromkeys(self, *args: Any, **values: Any) -> dict:
            return dict.fromkeys(*args, **values)

    class Namespace(utils.Namespace):
        """Refuses names of Python's internals."""

        def __init__(*args: Any, **values: Any) -> None:  # a template may set `self` too
            self, *given = args
            values = dict(*given, **values)
            for name in values:
                Namespace._check(name)
            utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    def raise_exception(message: Any) -> None:
        raise exceptions.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


def _reply(compiled: Callable[[str], Any], line: bytes, bounds: dict[str, Any]) -> bytes:
    """Render one request; return a line with "text", or why there is none.

    "refused" is what the template says, "bound" what it does beyond its bounds.
    """
    try:
        try:
            request = json.loads(line.decode("utf-8", "surrogatepass"))
            most = most_characters(bounds["characters"], len(line))
            pieces = compiled(request["template"]).generate(request["variables"])
            return _line(_joined(pieces, most))
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # whatever a template may raise
            return _line({"refused": _one_line(str(error)) or type(error).__name__})
    except MemoryError:
        return _line({"bound": f"takes more than {bounds['memory'] / 2**30:g} GiB of memory"})
    except RecursionError:
        return _line({"bound": "nests, or calls itself, too deeply"})
    except Exception as error:  # even the text of an error may be one
        return _line({"refused": type(error).__name__})


def _joined(pieces: Any, most: int) -> dict[str, str]:
    written, kept = 0, []
    for piece in pieces:
        written += len(piece)
        if written > most:
            return {"bound": f"writes more than {most:,} characters"}
        kept.append(piece)
    return {"text": "".join(kept)}


def _one_line(text: str) -> str:
    shown = text[: _LONGEST_REFUSAL + 1]
    shown = " ".join("".join(c if c.isprintable() else " " for c in shown).split())
    return shown if len(text) <= _LONGEST_REFUSAL else f"{shown[:_LONGEST_REFUSAL]}..."


def _line(reply: dict[str, str]) -> bytes:
    # Half characters (lone surrogates) come back as they went.
    return json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _send(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _limit(name: str, most: int) -> None:
    """Lower a limit of this process; where the system has no such limit, nothing happens."""
    if resource is None:
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(kind, (most, hard))


if __name__ == "__main__":
    main()

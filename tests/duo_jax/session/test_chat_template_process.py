"""The process that renders chat templates: one, quick to start, and nothing is left of it."""

import ast
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from duo_jax.errors import InputError
from duo_jax.session import chat_template_process
from duo_jax.session.chat_template import Bounds, Renderer

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("signals_of_a_terminal")]
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FOREVER = "{% for x in [1]|slice(10**12) %}{% endfor %}"
FOREVER_IN_C = "{{ 10**(10**10) }}"  # no thread of Python's can interrupt it


@pytest.fixture
def renderer():
    made = Renderer()
    yield made
    made.close()


def show(renderer: Renderer, template: str, content: str = "Hi") -> str:
    return renderer.render(template, {"messages": [{"role": "user", "content": content}]})


def children() -> set[int]:
    """Return this process's children, zombies too."""
    found: set[int] = set()
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread, which has ended since
            found.update(map(int, (task / "children").read_text().split()))
    return found


def alive(process: int) -> bool:
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # a container's first process reaps nobody


def gone(process: int, *, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while alive(process) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(process)


def test_it_imports_jinja2_and_the_standard_library_alone():
    tree = ast.parse(pathlib.Path(chat_template_process.__file__).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names - sys.stdlib_module_names == {"jinja2"}


@only_linux
def test_one_process_serves_until_a_template_goes_too_far(capfd):
    hasty = Renderer(Bounds(seconds=1.0))
    before = children()
    show(hasty, "a")
    (first,) = children() - before
    limits = pathlib.Path(f"/proc/{first}/limits").read_text()
    assert f"Max address space         {2**30} " in limits
    with pytest.raises(InputError):
        show(hasty, "{{ raise_exception('no') }}")
    show(hasty, "b")
    assert children() - before == {first}
    with pytest.raises(InputError):
        show(hasty, FOREVER)
    assert children() - before == set()  # no zombie either
    with pytest.raises(InputError, match="writes more"):
        show(hasty, "{{ 'x' * 10000000 }}")
    assert children() - before == set()
    assert show(hasty, "c") == "c"
    (second,) = children() - before
    os.kill(second, signal.SIGKILL)  # by anybody
    assert gone(second)
    assert show(hasty, "d") == "d"
    hasty.close()
    hasty.close()
    assert children() - before == set()
    assert capfd.readouterr() == ("", "")


@only_linux
def test_a_crash_is_one_line(renderer):
    threading.Timer(1, lambda: os.kill(renderer._process.pid, signal.SIGSEGV)).start()
    with pytest.raises(InputError, match=r"crashes the process that renders it \(signal 11\)"):
        show(renderer, FOREVER)
    assert show(renderer, "a") == "a"


def test_what_is_no_fault_of_the_template_is_no_input_error(renderer, monkeypatch, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        renderer.render("a", {"x": object()})
    for code, words in (("", "did not start"), ("print('ready'); input()", "ended with code 0")):
        (tmp_path / "broken.py").write_text(code)
        monkeypatch.setattr(chat_template_process, "__file__", str(tmp_path / "broken.py"))
        with pytest.raises(RuntimeError, match=words):
            show(renderer, "a")


@only_linux
def test_ctrl_c_does_not_reach_it_and_leaves_no_stale_answer(renderer):
    show(renderer, "a")
    process = renderer._process.pid
    assert os.getsid(process) == process
    os.kill(process, signal.SIGINT)
    assert show(renderer, "b") == "b"
    assert renderer._process.pid == process
    start = time.monotonic()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        show(renderer, FOREVER)
    assert not alive(process)
    assert time.monotonic() - start < 4  # before a bound ends it
    assert show(renderer, "c") == "c"


def test_threads_take_turns(renderer):
    answers = {}

    def ask(name: str) -> None:
        answers[name] = [show(renderer, "{{ messages[0].content }}", name) for _ in range(50)]

    threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {str(i): [str(i)] * 50 for i in range(4)}


@pytest.mark.one_in(2)
@only_linux
@pytest.mark.parametrize(
    ("template", "how"),
    [
        ("idle", signal.SIGTERM),
        (FOREVER_IN_C, signal.SIGKILL),
        pytest.param(FOREVER, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("idle", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_it_ends_with_its_parent(template, how):
    code = (
        "import sys; from duo_jax.session.chat_template import Bounds, Renderer\n"
        "renderer = Renderer(Bounds(seconds=0.9))\n"
        "renderer.render('a', {}); print(renderer._process.pid, flush=True)\n"
        "sys.argv[1] == 'idle' and input() or renderer.render(sys.argv[1], {})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, template],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        process = int(parent.stdout.readline())
        assert alive(process)
        time.sleep(0.2)  # it renders
        parent.send_signal(how)
        assert parent.stderr.read() == ""
    assert parent.returncode == -how
    assert gone(process)


@only_linux
def test_a_fork_does_not_share_it(renderer):
    show(renderer, "a")
    first = renderer._process
    renderer._owner = -1  # as the child of a fork finds it: its own id is another one
    assert show(renderer, "b") == "b"
    assert renderer._process is not first
    assert first.poll() is None
    first.communicate()  # its input ends, and so does it
    assert first.returncode == 0


def test_it_starts_quickly(renderer):
    start = time.monotonic()
    show(renderer, "a")
    assert time.monotonic() - start < 3  # 0.07 s on a machine at rest

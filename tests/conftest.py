"""Strictness for every test: no silent promotion of dtypes or ranks; warnings are errors."""

import atexit
import gc
import math
import os
import pathlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# There is a worker for every core. More threads than that wait for each other, and torch's and
# XLA's do so at full speed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PJRT_NPROC", "1")
# Tiny programs spend their time in the compiler: less of it without its last optimisations, with a
# program in one piece instead of 32, without a schedule for several cores, and a third of the rest
# by the older way to machine code, which jax 0.12 does not have (an unknown flag ends the process).
# Not for a GPU, where kernels that are not optimised spill, and would not be what is served.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false "
        + ("--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
    )

import jax
import jaxtyping
import pytest

if TYPE_CHECKING:
    from kernels.aot_process import Compiler

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests trace a program that an earlier one has compiled. Each worker keeps its programs in a
# folder of its own: jax does not write them in one step, so another worker could read half of one.
_programs = tempfile.mkdtemp(prefix="duo-jax-tests-")
atexit.register(shutil.rmtree, _programs, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _programs)
# Commands in processes of their own keep theirs beside them, not in the user's folder.
os.environ["DUO_JAX_COMPILE_CACHE"] = os.path.join(_programs, "commands")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

_jaxtyped = jaxtyping.jaxtyped


def _check_types(*, typechecker: Any) -> Callable[[Any], Any]:
    """Check the arguments and results of functions, but for those within functions.

    Those are made at every call, in each layer of each trace, and making a check takes 10 ms.
    """

    def decorate(decorated: Any) -> Any:
        if "<locals>" in getattr(decorated, "__qualname__", ""):
            return decorated
        return _jaxtyped(decorated, typechecker=typechecker)

    return decorate


jaxtyping.jaxtyped = _check_types

if version("jax").startswith("0.10."):
    # A third of what a small program costs is making a context to write it down in. Later versions
    # of jax use one ten times themselves.
    from jax._src.interpreters import mlir

    _new_context = mlir.make_ir_context
    _contexts = threading.local()

    def _a_context_often_used() -> Any:
        """Return a context of this thread, of which each serves some programs."""
        _contexts.uses = getattr(_contexts, "uses", -1) + 1
        if _contexts.uses % 50 == 0:  # what programs write in a context stays there
            _contexts.latest = _new_context()
        return _contexts.latest

    mlir.make_ir_context = _a_context_often_used

_most_memory = 3e9  # bytes of a worker


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """Where only `core` tests run, import no file that has none: that takes as long."""
    if not config.getoption("markexpr").startswith("core ") or collection_path.suffix != ".py":
        return None
    return None if "mark.core" in collection_path.read_text(encoding="utf-8") else True


@pytest.hookimpl(tryfirst=True)  # before those that -m does not want are taken out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases slow that `one_in` leaves out: all but the first of every so many."""
    seen: dict[str, int] = {}
    for item in items:
        if (mark := item.get_closest_marker("one_in")) and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            place = seen[test] = seen.get(test, -1) + 1
            if place % mark.args[0]:
                item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Look for garbage less often: tracing makes many objects, and little of it is in cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Free what jax keeps for programs that no other file runs, before it is gigabytes."""
    global _most_memory
    yield
    if _resident_bytes() > _most_memory:
        gc.unfreeze()
        jax.clear_caches()
        gc.collect()
        # Not all of it comes back; to throw out all programs after every file would be slow.
        _most_memory = max(_most_memory, _resident_bytes() + 1e9)
    gc.freeze()  # looking through all of it takes a second, and some code of ours collects often


def _resident_bytes() -> float:
    """Return the memory that this process has now; infinity where the system does not say."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return math.inf
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _unhooked() -> Iterator[None]:
    """Call functions as a user does, who has no checker of type hints in front of them.

    The checker takes a tenth of the time of what is traced. Hints are checked where functions are
    tested, not again where whole commands run.
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


unhooked = pytest.fixture(_unhooked)
unhooked_file = pytest.fixture(_unhooked, scope="module")


@pytest.fixture
def signals_of_a_terminal() -> Iterator[None]:
    """Have signals end this process and those that it starts, also after `&` and nohup.

    These have a process ignore some, and whatever it starts too.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        ctrl_c = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if ctrl_c else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def little_text() -> Iterator[None]:
    """Spare commands the tokenizing of all built-in text, which takes most of their time."""
    from duo_jax.data import documents  # after the type checker is in place

    text = documents.load_documents([])[:20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_built_in", lambda: text)
        yield


@pytest.fixture(scope="session")
def gpu_compiler() -> None:
    """Skip where nothing can be compiled for a GPU, saying what is missing."""
    from kernels import aot  # after the type checker is in place

    reason = aot.unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def compiler(gpu_compiler: None) -> Iterator["Compiler"]:
    """Compile for GPUs in a process that all tests share; skip where nothing can be compiled.

    Without the flags above: kernels that are not optimised do spill.
    """
    from kernels.aot_process import Compiler

    del gpu_compiler
    with Compiler() as shared:
        yield shared

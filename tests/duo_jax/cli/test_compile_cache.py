"""Programs that commands keep: found again, shared, bounded, and never in the way."""

import dataclasses
import io
import os
import pathlib
import subprocess
import sys
import types
import warnings

import jax
import pytest

from duo_jax import cli
from duo_jax.cli import compile_cache
from tests.processes import without_plugin_log
from tests.test_imports import ROOT


@dataclasses.dataclass(frozen=True)
class Flags:
    pass


# Compiles three programs; prints how many jax found, and what it is told.
_SCRIPT = """
import sys
import jax
from duo_jax.cli import compile_cache

compile_cache.switch_on()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
for i in range(3):
    f = lambda x: x * (i + 2.0) + i
    f.__name__ = f"program_{i}"
    assert float(jax.jit(f)(1.0)) == i + 2.0 + i
print(found.count("/jax/compilation_cache/cache_hits"), jax.config.jax_compilation_cache_dir)
"""


def start(**environment: str) -> subprocess.Popen[str]:
    plain = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT],
        env=plain | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return how many programs were found, the folder, and what was said."""
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    found, place = out.split(maxsplit=1)
    return int(found), place.strip(), without_plugin_log(said)


def programs(place: pathlib.Path) -> list[pathlib.Path]:
    return sorted(place.glob("jit_program_*-cache"))


@pytest.mark.slow
def test_processes_share_a_folder_and_write_again_what_is_damaged(tmp_path):
    place = str(tmp_path / "programs")
    both = [start(DUO_JAX_COMPILE_CACHE=place) for _ in range(2)]
    for process in both:
        _, where, said = finish(process)
        assert (where, said) == (place, "")
    first, second, _ = programs(tmp_path / "programs")

    # An entry that a killed process left is written again.
    whole = len(first.read_bytes())
    first.write_bytes(first.read_bytes()[:40])
    first.with_name(first.name.replace("-cache", "-atime")).unlink()
    first.with_name("gone-atime").write_bytes(bytes(8))
    # And so is one of which a bit is another. Unpacked without a checksum, most of them become
    # another program without a word.
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    for found in (1, 3):  # written again, where jax keeps what is there
        assert finish(start(DUO_JAX_COMPILE_CACHE=place)) == (found, place, "")
    assert len(first.read_bytes()) == whole
    assert not first.with_name("gone-atime").exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_costs_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "programs"
    found, where, said = finish(start(DUO_JAX_COMPILE_CACHE=str(place)))
    assert (found, where) == (0, "None")
    assert said == f"{place} cannot be used (Not a directory): programs are not kept\n"


def test_a_folder_that_jax_cannot_name_costs_one_line(tmp_path, monkeypatch):
    said = io.TextIOWrapper(io.BytesIO(), errors="backslashreplace")  # as Python opens it
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "a\udcff"))
    config = types.SimpleNamespace(values={"jax_compilation_cache_dir": None})
    monkeypatch.setattr(jax, "config", config)
    compile_cache.switch_on()
    said.flush()
    assert said.buffer.getvalue().endswith(b" cannot be used (no UTF-8): programs are not kept\n")


@pytest.mark.slow
def test_who_tells_jax_where_is_obeyed(tmp_path):
    mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
    environment = {"DUO_JAX_COMPILE_CACHE": mine, "JAX_COMPILATION_CACHE_DIR": theirs}
    assert finish(start(**environment))[1] == theirs
    assert not pathlib.Path(mine).exists()


def test_the_folder_is_the_user_s_and_bounded(tmp_path, monkeypatch):
    monkeypatch.delenv(compile_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = compile_cache.folder()
    assert place == tmp_path / "duo_jax" / "programs"
    told = {}

    class Config:
        values = {"jax_compilation_cache_dir": None}  # noqa: RUF012
        update = staticmethod(told.__setitem__)

    monkeypatch.setattr(jax, "config", Config)
    monkeypatch.setattr(warnings, "filterwarnings", lambda *_, **__: None)
    compile_cache.switch_on()
    assert told["jax_compilation_cache_dir"] == str(place)
    assert told["jax_compilation_cache_max_size"] == 2**30
    assert place.stat().st_mode & 0o777 == 0o700
    told.clear()
    monkeypatch.setenv(compile_cache.VARIABLE, "off")
    compile_cache.switch_on()
    assert told == {}


@pytest.mark.parametrize(
    ("words", "options", "expected"),
    [([], {}, True), (["--no-compile-cache"], {}, False), ([], {"keep_programs": False}, False)],
)
def test_a_flag_of_every_command_switches_it_off(monkeypatch, words, options, expected):
    calls = []
    monkeypatch.setattr(compile_cache, "switch_on", lambda: calls.append("on"))
    cli.run(calls.append, Flags, prog="p", description="d", args=words, **options)
    assert calls == [*(["on"] if expected else []), Flags()]


def test_help_names_the_flag(capsys):
    with pytest.raises(SystemExit):
        cli.run(print, Flags, prog="p", description="d", args=["--help"])
    assert "unless --no-compile-cache is given" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_python_code_keeps_nothing_by_itself():
    code = "import duo_jax, jax; duo_jax.load; print(jax.config.jax_compilation_cache_dir)"
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stdout == "None\n"

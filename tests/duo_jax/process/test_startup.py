"""No garbage is collected while a command is imported, but again when it runs."""

import dataclasses
import gc

import pytest

from duo_jax import cli
from duo_jax.process import signals, startup


@dataclasses.dataclass(frozen=True)
class Flags:
    pass


@pytest.fixture
def collecting():
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("collecting")
def test_garbage_is_collected_again_when_a_command_runs(monkeypatch):
    monkeypatch.setattr(signals, "end_at_once", lambda: None)  # pytest has other things to end
    seen = []

    def command(flags: Flags) -> None:
        seen.append((flags, gc.isenabled(), gc.get_freeze_count() > 0))

    def run() -> None:
        cli.run(command, Flags, prog="test", description="", args=[], keep_programs=False)

    startup.begin()
    assert not gc.isenabled()
    run()
    gc.unfreeze()
    run()  # called by another program, whose objects are left alone
    assert seen == [(Flags(), True, True), (Flags(), True, False)]

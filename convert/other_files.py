"""Copy what a model folder holds besides weights: tokenizer, presets, pattern, prompt, model card.

Each entry of the folder, a file or a subfolder with all that is in it, is copied whole or not at
all. Left out are

- weights: files that end as those of any framework do, optimiser states included, their indices,
  and what a converted checkpoint consists of (duo_jax.json, params/);
- subfolders with such files anywhere in them (onnx/, original/, checkpoint-500/);
- what begins with a dot (.git, .cache, .gitattributes), in subfolders too;
- what takes more than 100 MB: data sets, videos, or weights under a name not listed here;
- what is neither a file nor a folder, links that lead nowhere, and links to folders, which may lead
  to anything or in circles. Only a link called pattern/ is followed.

Links to files are copied as the files: a snapshot in the Hugging Face cache holds nothing else.
"""

import fnmatch
import os
import pathlib
import shutil
from typing import NoReturn

from duo_jax.checkpoints.orbax_checkpoint import MARKER_FILE, PARAMS_FOLDER
from duo_jax.files import reading

_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp", "*.gguf", "*.ggml"),
    *("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.pdparams", "*.nemo"),
    *("*.safetensors.index.json", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json"),
    *(MARKER_FILE, "manifest.ocdbt"),
)
_LARGEST = 100_000_000  # bytes; the largest tokenizers have about 40 MB
_PATTERN = "pattern"


def copy(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copy the entries of a model folder that are not weights.

    Args:
      source: the model folder.
      target: where to; an existing folder.

    Returns:
      The entries that were left out, but for weights and what begins with a dot.

    Raises:
      InputError: a file cannot be read.
    """
    left_out = []
    with reading(source):
        entries = sorted(os.listdir(source))
    for name in entries:
        if name.startswith(".") or name == PARAMS_FOLDER or _is_weights(name):
            continue
        files = _files_of(source / name)
        if files is None:
            left_out.append(name)
            continue
        for file in files:
            _copy_file(file, target / file.relative_to(source))
    return left_out


def _files_of(entry: pathlib.Path) -> list[pathlib.Path] | None:
    """Return the files to copy for a file or folder; None where it is left out."""
    if entry.is_file():
        files = [entry]
    elif entry.is_dir() and (entry.name == _PATTERN or not entry.is_symlink()):
        files = []
        for folder, subfolders, names in os.walk(entry, onerror=_refuse):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            if any(map(_is_weights, names)):
                return None
            paths = (pathlib.Path(folder, name) for name in sorted(names) if name[0] != ".")
            files += filter(pathlib.Path.is_file, paths)
    else:
        return None
    with reading(entry):
        size = sum(file.stat().st_size for file in files)
    return files if size <= _LARGEST else None


def _refuse(error: OSError) -> NoReturn:
    """Report a subfolder that cannot be read, which os.walk would skip."""
    with reading(error.filename):
        raise error


def _is_weights(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _WEIGHTS)


def _copy_file(file: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with reading(file):
        opened = file.open("rb")
    with opened, target.open("wb") as copied:
        shutil.copyfileobj(opened, copied)

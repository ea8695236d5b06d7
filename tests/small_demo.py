"""The demo model's second layer as a model: it compiles in a third of the time.

It has retrieval heads and streaming ones. What it writes makes no sense, but is more than one word
again and again, as it is of other layers.
"""

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

from safetensors.numpy import load_file, save_file

from duo_jax.checkpoints import pretrained

_LAYER = 1
_GATES = "0.9 0.8 0.1 0.7\n"


@functools.cache
def small_demo() -> pathlib.Path:
    """Return its folder, which is gone when this process ends."""
    place = pathlib.Path(tempfile.mkdtemp(prefix="duo-jax-small-demo-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = shutil.copytree(pretrained.resolve("demo"), place / "demo")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers." not in name}
    old = f"layers.{_LAYER}."
    named = ((name, weight) for name, weight in weights.items() if old in name)
    kept |= {name.replace(old, "layers.0."): weight for name, weight in named}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    gates = folder / "pattern" / "full_attention_heads.tsv"
    gates.write_text(_GATES.replace(" ", "\t"))
    return folder

"""GGUF files, damaged in their structure and in their bytes, against the gguf package's reader."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from duo_jax.checkpoints.gguf import read_header
from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.checkpoints.weights import open_weights
from duo_jax.session.tokenization import load_tokenization
from tests import gguf_files, models
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import damaged_bytes

_LLAMA = models.CASES["llama-3, grouped queries"] | {"num_hidden_layers": 1, "vocab_size": 640}
_SCALED = models.CASES["llama-3.1, scaled rope"] | {"num_hidden_layers": 1, "vocab_size": 640}
# Numbers for counts, lengths, sizes, types and offsets.
_HOSTILE = [0, 1, 2, 3, 7, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


def seeds(folder) -> list[bytes]:
    """Return small valid files."""
    files = []
    for i, (raw, tokenizer) in enumerate(
        [
            (_LLAMA, gguf_files.byte_level("smollm")),
            (_SCALED, gguf_files.sentencepiece(add_bos_token=True)),
        ]
    ):
        gguf_files.write(folder / f"{i}", raw, stored=gguf_files.Q8_0, tokenizer=tokenizer)
        files.append((folder / f"{i}").read_bytes())
    return files


@st.composite
def _with_another_number(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """Change counts, lengths, types and offsets, which lie at places that names give away."""
    content = draw(st.sampled_from(files))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        names = [b"GGUF", b"general.", b"tokenizer.", b"llama.", b"blk.", b"token_embd.weight"]
        name = draw(st.sampled_from(names))
        at = content.find(name, draw(st.integers(0, len(content))))
        if at < 0:
            at = content.find(name)
        at += draw(st.integers(-12, 64))
        code = draw(st.sampled_from("IQ"))
        number = draw(st.sampled_from(_HOSTILE)) & (2**32 - 1 if code == "I" else 2**64 - 1)
        at = min(max(at, 0), len(content) - 8)
        new = struct.pack(f"<{code}", number)
        content = content[:at] + new + content[at + len(new) :]
    return content


def _cases() -> st.SearchStrategy[bytes]:
    import pathlib
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files = seeds(pathlib.Path(folder))
    numbers = _with_another_number(files)
    return st.one_of(numbers, numbers, damaged_bytes(files))


def _tensors(file) -> dict[str, np.ndarray]:
    weights = open_weights(file)
    return {tensor.name: np.asarray(weights.read(tensor)) for tensor in weights.tensors}


@fuzzed(_cases, thorough=10_000)
def test_what_is_read_is_what_the_package_reads(content, folder):
    # A new file: writing into one that is mapped would change what is read of it.
    file = folder / "model.gguf"
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    attempt(lambda: load_tokenizer(file), size=len(content))
    header = attempt(lambda: read_header(file), size=len(content))
    found = attempt(lambda: _tensors(file), size=len(content))
    if header is REFUSED:
        return
    theirs = gguf_files.gguf.GGUFReader(file)
    _check_metadata(header.metadata, theirs)
    assert header.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.shape, ours.start) == (tuple(tensor.shape.tolist())[::-1], tensor.data_offset)
        if found is not REFUSED and tensor.name == "token_embd.weight":
            with np.errstate(all="ignore"):
                expected = gguf_files.gguf.dequantize(tensor.data, tensor.tensor_type)
            mine = found["model.embed_tokens.weight"].astype(np.float32)
            np.testing.assert_array_equal(mine, expected)


def _check_metadata(ours: dict[str, Any], theirs: Any) -> None:
    """Compare all that is not a list of texts, which their reader takes long for."""
    for name, value in ours.items():
        if isinstance(value, list):
            assert len(value) == len(theirs.fields[name].data)
        elif isinstance(value, bool):  # they read any byte as it is
            assert value == bool(theirs.fields[name].parts[-1].view(np.uint8)[0])
        else:
            expected = theirs.fields[name].contents()
            np.testing.assert_array_equal(np.asarray(value), np.asarray(expected))


_KINDS = gguf_files.gguf.GGUFValueType
_OTHER = {
    "whole numbers": ([1, 2], _KINDS.ARRAY),
    "numbers": ([1.5, 2.5], _KINDS.ARRAY),
    "texts": (["a", "b"], _KINDS.ARRAY),
    "a list of one": ([7], _KINDS.ARRAY),
    "a text": ("x", _KINDS.STRING),
    "NaN": (float("nan"), _KINDS.FLOAT32),
    "beyond float32": (1e300, _KINDS.FLOAT64),
    "true": (True, _KINDS.BOOL),
    "the largest": (2**64 - 1, _KINDS.UINT64),
}
_OPTIONAL = ["split.count", "general.alignment", "llama.rope.scaling.factor"]
_OPTIONAL += [f"tokenizer.ggml.{kind}_token_id" for kind in ("eot", "padding", "unknown")]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("other", _OTHER)
@pytest.mark.parametrize(
    ("raw", "tokenizer"),
    [(_LLAMA, gguf_files.byte_level("smollm")), (_SCALED, gguf_files.sentencepiece())],
    ids=["byte-level", "sentencepiece"],
)
def test_no_entry_of_another_type_ends_in_another_error(raw, tokenizer, other, tmp_path):
    file = tmp_path / "model.gguf"
    gguf_files.write(file, raw, tokenizer=tokenizer)
    load_tokenizer(file)  # imports take seconds
    for name in [*read_header(file).metadata, *_OPTIONAL]:
        file.unlink()  # a new file, as above

        def change(writer, name=name):
            writer.kv_data[0].pop(name, None)
            writer.add_key_value(name, *_OTHER[other])

        gguf_files.write(file, raw, tokenizer=tokenizer, change=change)
        for read in (read_header, open_weights, load_tokenizer, load_tokenization):
            attempt(lambda read=read: read(file))

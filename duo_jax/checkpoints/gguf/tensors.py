"""The tensors of a GGUF file under their Hugging Face names and in Hugging Face's layout.

A tensor that is stored as numbers is a view of the mapped file; one that is stored in blocks
becomes float32 when it is read, and no other is in memory then. Files of architecture llama have
the rows of q and k in another order, the one of the original rotary embedding, which turns channels
(2i, 2i + 1) of a head together where Hugging Face turns (i, i + half); it is undone here.
"""

import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np

from duo_jax.checkpoints.gguf.config import architecture_of
from duo_jax.checkpoints.gguf.header import StoredTensor, library, read_header
from duo_jax.checkpoints.gguf.rope import FACTORS
from duo_jax.checkpoints.tensor_info import TensorInfo
from duo_jax.errors import quoted

_STORED_AS_NUMBERS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_LAYER = re.compile(r"blk\.([0-9]+)\.(\w+)\.(weight|bias)")
_NOT_PARAMETERS = re.compile(rf"{re.escape(FACTORS)}|blk\.[0-9]+\.attn_rot_embd\.weight")
_PERMUTED = re.compile(r"\.([qk])_proj\.(weight|bias)$")
_AT_ONCE = 1 << 17  # numbers that are unpacked together: they stay in a core's cache


class GgufTensors:
    """All tensors of a file.

    Raises:
      InputError: the file cannot be read, the model is not supported, or a tensor has a type that
        the gguf package cannot turn into numbers.
    """

    def __init__(self, path: pathlib.Path) -> None:
        header = read_header(path)
        self.architecture = architecture_of(header)
        self._path = path
        self._heads = {"q": self.architecture.num_q_heads, "k": self.architecture.num_kv_heads}
        self._permuted = header.metadata["general.architecture"] == "llama"
        self._stored: dict[str, StoredTensor] = {}
        self.info: dict[str, TensorInfo] = {}
        readable: dict[Any, bool] = {}
        for name, tensor in header.tensors.items():
            if _NOT_PARAMETERS.fullmatch(name):
                continue
            if tensor.type not in readable:
                readable[tensor.type] = _is_readable(tensor.type)
            if not readable[tensor.type]:
                raise header.refused(
                    f"tensor {quoted(name)} has type {tensor.type.name}, which the gguf package "
                    "cannot turn into numbers"
                )
            theirs = hf_name(name)
            self._stored[theirs] = tensor
            self.info[theirs] = TensorInfo(
                shape=tensor.shape,
                dtype_name=tensor.type.name,
                dtype=_STORED_AS_NUMBERS.get(tensor.type.name, np.dtype(np.float32)),
            )

    def read(self, name: str) -> np.ndarray:
        """Return one tensor; possibly a read-only view of the file."""
        tensor = self._stored[name]
        data = np.memmap(self._path, np.uint8, "r", tensor.start, (tensor.num_bytes,))
        array = _numbers(np.asarray(data), tensor)
        permuted = _PERMUTED.search(name) if self._permuted else None
        if permuted is None:
            return array
        pairs = array.reshape(self._heads[permuted[1]], -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)


def hf_name(name: str) -> str:
    """Return a tensor's name in Hugging Face files; its own where there is none."""
    in_layer = _IN_LAYER.fullmatch(name)
    if in_layer is None or in_layer[2] not in _MODULES:
        return _NAMES.get(name, name)
    return f"model.layers.{in_layer[1]}.{_MODULES[in_layer[2]]}.{in_layer[3]}"


def _numbers(data: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """Return the values of a tensor's bytes, unpacked some blocks at a time."""
    dtype = _STORED_AS_NUMBERS.get(tensor.type.name)
    if dtype is not None:
        return data.view(dtype).reshape(tensor.shape)
    block_size, block_bytes = library().GGML_QUANT_SIZES[tensor.type]
    blocks = data.reshape(-1, block_bytes)
    array = np.empty((len(blocks), block_size), np.float32)
    step = _AT_ONCE // block_size
    with np.errstate(all="ignore"):  # any bytes are numbers, not finite ones always
        for start in range(0, len(blocks), step):
            some = slice(start, start + step)
            row = blocks[some].reshape(1, -1)  # gguf unpacks 16 rows at a time, however short
            array[some] = library().dequantize(row, tensor.type).reshape(-1, block_size)
    return array.reshape(tensor.shape)


def _is_readable(kind: Any) -> bool:
    """Whether the values of a type can be had: gguf's integers are no weights."""
    if kind.name in _STORED_AS_NUMBERS:
        return True
    _, block_bytes = library().GGML_QUANT_SIZES[kind]
    try:
        library().dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True

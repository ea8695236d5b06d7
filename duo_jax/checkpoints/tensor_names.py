"""The map between the tensors of a Hugging Face checkpoint and our parameters.

It is one ordered table. Each row names a tensor on both sides, and its axes on both sides with the
same words; axes that share one dimension stand in parentheses. So

    "(q_heads head_dim) embed"  <->  "embed q_heads head_dim"

means: split the first dimension into heads and head_dim, then move embed to the front. Values are
only moved, so a round trip is exact to the bit.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

import numpy as np

from duo_jax.errors import InputError, quoted
from duo_jax.model.config import ModelConfig

Path = tuple[str, ...]

# Not parameters: rotary tables, causal masks and positions that old exporters saved too.
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\..*|rope\.freqs|freqs_(cis|cos|sin)|(\w+_)?inv_freq|(cos|sin)_cached|cos_sin_cache"
    r"|masked_bias|causal_mask|attention_mask|position_ids|(self_attn|attn|attention)\.bias)$"
)
# What torch's wrappers write into the names of the modules that they wrap.
_WRAPPERS = ("_orig_mod", "module", "_forward_module")
_WRAPPERS += ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _always(architecture: ModelConfig) -> bool:
    del architecture
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    name: str  # {} stands for the layer
    hf_axes: str
    path: str
    axes: str
    present: Callable[[ModelConfig], bool] = _always


def _embedding(name: str, path: str) -> _Row:
    return _Row(name=name, hf_axes="vocab embed", path=path, axes="vocab embed")


def _norm(name: str, axis: str, present=_always) -> _Row:
    path = name.replace("model.", "").replace("layers.{}", "layers").replace(".", "/")
    return _Row(
        name=f"{name}.weight", hf_axes=axis, path=f"{path}/scale", axes=axis, present=present
    )


def _linear(name: str, out_axes: str, in_axes: str, bias=None) -> tuple[_Row, ...]:
    def joined(axes: str) -> str:
        return f"({axes})" if " " in axes else axes

    path = name.replace("model.", "").replace("layers.{}", "layers").replace(".", "/")
    kernel = _Row(
        name=f"{name}.weight",
        hf_axes=f"{joined(out_axes)} {joined(in_axes)}",
        path=f"{path}/kernel",
        axes=f"{in_axes} {out_axes}",
    )
    if bias is None:
        return (kernel,)
    return kernel, _Row(
        name=f"{name}.bias",
        hf_axes=joined(out_axes),
        path=f"{path}/bias",
        axes=out_axes,
        present=bias,
    )


_ATTENTION, _MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
_TABLE = (
    _embedding("model.embed_tokens.weight", "embed_tokens/embedding"),
    _norm("model.layers.{}.input_layernorm", "embed"),
    *_linear(f"{_ATTENTION}.q_proj", "q_heads head_dim", "embed", lambda arch: arch.qkv_bias),
    *_linear(f"{_ATTENTION}.k_proj", "kv_heads head_dim", "embed", lambda arch: arch.qkv_bias),
    *_linear(f"{_ATTENTION}.v_proj", "kv_heads head_dim", "embed", lambda arch: arch.qkv_bias),
    _norm(f"{_ATTENTION}.q_norm", "head_dim", lambda arch: arch.qk_norm),
    _norm(f"{_ATTENTION}.k_norm", "head_dim", lambda arch: arch.qk_norm),
    *_linear(f"{_ATTENTION}.o_proj", "embed", "q_heads head_dim", lambda arch: arch.o_bias),
    _norm("model.layers.{}.post_attention_layernorm", "embed"),
    *_linear(f"{_MLP}.gate_proj", "mlp", "embed", lambda arch: arch.mlp_bias),
    *_linear(f"{_MLP}.up_proj", "mlp", "embed", lambda arch: arch.mlp_bias),
    *_linear(f"{_MLP}.down_proj", "embed", "mlp", lambda arch: arch.mlp_bias),
    _norm("model.norm", "embed"),
    _Row(
        name="lm_head.weight",
        hf_axes="vocab embed",
        path="lm_head/kernel",
        axes="embed vocab",
        present=lambda arch: not arch.tie_embeddings,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor, as Hugging Face stores it and as our parameter tree holds it.

    Attributes:
      name: in Hugging Face files, such as "model.layers.3.mlp.up_proj.weight".
      hf_shape: its shape there.
      path: in our tree, such as ("layers", "mlp", "up_proj", "kernel").
      layer: its place on the leading axis of that leaf; None for leaves without one.
      shape: its shape in our tree, without that axis.
    """

    name: str
    hf_shape: tuple[int, ...]
    path: Path
    layer: int | None
    shape: tuple[int, ...]
    # Our axes' order among the (split) Hugging Face axes, and sizes of the latter.
    _order: tuple[int, ...] = dataclasses.field(repr=False)
    _split: tuple[int, ...] = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """Return a view of a Hugging Face array in our layout."""
        if array.shape != self.hf_shape:
            raise ValueError(f"{self.name}: {array.shape=}, expected {self.hf_shape}")
        return array.reshape(self._split).transpose(self._order)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Return one of our arrays (a single layer) in Hugging Face's layout, contiguous."""
        if array.shape != self.shape:
            raise ValueError(f"{self.name}: {array.shape=}, expected {self.shape}")
        split = array.transpose(np.argsort(self._order))
        return np.ascontiguousarray(split).reshape(self.hf_shape)


def tensors(architecture: ModelConfig) -> tuple[Tensor, ...]:
    """Return every tensor of a model: embedding, layer by layer, final norm, output projection."""
    rows = [row for row in _TABLE if row.present(architecture)]
    in_layer = ["{}" in row.name for row in rows]
    first, last = in_layer.index(True), len(rows) - in_layer[::-1].index(True)
    return (
        *(_tensor(row, architecture, None) for row in rows[:first]),
        *(
            _tensor(row, architecture, i)
            for i in range(architecture.num_layers)
            for row in rows[first:last]
        ),
        *(_tensor(row, architecture, None) for row in rows[last:]),
    )


def in_file(names: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Return the names of files' tensors by the names that the model has for them.

    As in transformers, "model." may be missing or there once more; unlike there, what wrappers of
    torch add ("_orig_mod.", "module.") may be there. Names that mean none of `expected` stay.

    Raises:
      InputError: two names mean one tensor.
    """
    expected, found = set(expected), {}
    for name in names:
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        meant = (plain, f"model.{plain}", plain.removeprefix("model."))
        ours = next((each for each in meant if each in expected), name)
        if ours in found:
            raise InputError(f"{quoted(name)} and {quoted(found[ours])} are both {ours}")
        found[ours] = name
    return found


def is_buffer(name: str) -> bool:
    """Whether this is no parameter but something that models compute, so that nobody reads it."""
    return _BUFFERS.search(name) is not None


def _tensor(row: _Row, architecture: ModelConfig, layer: int | None) -> Tensor:
    sizes = {
        "vocab": architecture.vocab_size,
        "embed": architecture.embed_size,
        "mlp": architecture.mlp_size,
        "q_heads": architecture.num_q_heads,
        "kv_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
    }
    # "(q_heads head_dim) embed" -> [["q_heads", "head_dim"], ["embed"]]
    groups: list[list[str]] = []
    for word in row.hf_axes.split():
        if word.endswith(")"):
            groups[-1].append(word.rstrip(")"))
        else:
            groups.append([word.lstrip("(")])
    split = [axis for group in groups for axis in group]
    ours = row.axes.split()
    return Tensor(
        name=row.name.format(layer),
        hf_shape=tuple(math.prod(sizes[axis] for axis in group) for group in groups),
        path=tuple(row.path.split("/")),
        layer=layer,
        shape=tuple(sizes[axis] for axis in ours),
        _order=tuple(split.index(axis) for axis in ours),
        _split=tuple(sizes[axis] for axis in split),
    )

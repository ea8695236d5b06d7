"""A split model that is ready to run: parameters, and the settings that all sessions share."""

import dataclasses
import functools
import hashlib
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from duo_jax.cache import check_kv_format
from duo_jax.errors import InputError
from duo_jax.heads.reconstruction import Instruction
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh.devices import fetched
from duo_jax.model.quantised_weights import WeightFormat, format_of
from duo_jax.schema.check import argument
from duo_jax.schema.kinds import Count, Share
from duo_jax.serve import PrefillMode
from kernels import Implementation, dispatch

KeepBy = Literal["snapkv", "kvzip"]

_SAMPLES_PER_LEAF = 64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Runtime:
    """Parameters in serving form, and how they are run."""

    config: DuoConfig
    params: dict[str, Any]
    prefill_chunk: Count = 8192  # tokens per row and step
    prefill_mode: str = "exact"  # a PrefillMode
    implementation: str = "auto"  # of attention, a kernels.Implementation
    kv_format: str = "model"  # a KVFormat
    keep: float = 1.0  # fraction of tokens that retrieval heads keep (duo_jax.session.eviction)
    keep_by: str = "snapkv"  # a KeepBy
    instruction: Instruction | None = None  # to repeat the text; "kvzip" needs it
    mesh: Mesh | None = None  # of several devices, which share the parameters

    def __post_init__(self) -> None:
        chunk = argument("prefill_chunk", self.prefill_chunk, Count)
        object.__setattr__(self, "prefill_chunk", chunk)  # numpy's numbers become Python's
        argument("prefill mode", self.prefill_mode, PrefillMode)
        check_implementation(self.implementation)
        kv_format = check_kv_format(self.config, self.kv_format)
        object.__setattr__(self, "keep", argument("keep", self.keep, Share))
        argument("keep_by", self.keep_by, KeepBy)
        if self.keep < 1 and kv_format == "int2":
            raise InputError('"int2" packs 64 tokens together: none of them can be evicted')
        if self.keep < 1 and self.keep_by == "kvzip" and self.instruction is None:
            raise InputError('"kvzip" needs an instruction to repeat the text')

    @property
    def dtype(self) -> np.dtype:
        """The dtype of activations, and of caches in the format "model"."""
        return np.dtype(self.params["norm"]["scale"].dtype)

    @property
    def weight_format(self) -> WeightFormat:
        """The format of the layers' projections."""
        return format_of(self.params)

    @functools.cached_property
    def weights_digest(self) -> str:
        """A digest of some values of every parameter, in the order of heads that the split made.

        Tells models and head orders apart; no protection against tampering.
        """
        # w8a8 and int8 have the same leaves.
        return digest_of(self.params, "" if self.weight_format == "model" else self.weight_format)


def digest_of(params: Any, prefix: str = "") -> str:
    """Return a digest of some values of every parameter, and of a text; see `weights_digest`."""
    digest = hashlib.sha256(prefix.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        at = np.linspace(0, leaf.size - 1, min(leaf.size, _SAMPLES_PER_LEAF)).astype(np.int64)
        values = leaf[np.unravel_index(at, leaf.shape)]
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(fetched(values).astype(np.float32).tobytes())
    return digest.hexdigest()


def check_implementation(name: str) -> None:
    """Refuse an implementation of attention that does not exist or cannot run here.

    Raises:
      InputError: it cannot.
    """
    argument("implementation", name, Implementation)
    try:
        dispatch.check(name)
    except NotImplementedError as error:
        raise InputError(str(error)) from None

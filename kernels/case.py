"""What a named case of an op is: one list of them feeds tests, compile checks and benchmarks."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.dispatch import Implementation
from kernels.gpu import Gpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call of a kernel costs; numbers of the whole grid."""

    flops: float  # 2 per multiply-add, of visible (query, key) pairs only
    num_bytes: float  # every input read once, every output written once
    scheduled_flops: float  # of all tiles that the kernel multiplies, masked parts included
    scheduled_bytes: float  # that its programs load and store, unmasked; repeats may hit L2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(abc.ABC):
    """One call of an op. Subclasses add the sizes."""

    q_heads: int
    kv_heads: int
    head_dim: int = 128
    dtype: str = "bfloat16"
    compile_only: bool = False  # too large for the interpreter

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @abc.abstractmethod
    def shapes(self) -> tuple[Any, ...]:
        """Return the arguments of `run` as jax.ShapeDtypeStruct."""

    @abc.abstractmethod
    def integers(self) -> list[np.ndarray]:
        """Return the values of the integer arguments, in the order of `shapes`."""

    @abc.abstractmethod
    def run(self, *arguments, implementation: Implementation, block_sizes=None) -> Any:
        """Call the op."""

    @abc.abstractmethod
    def block_sizes(self, *, gpu: Gpu) -> Any:
        """Return the tile sizes that the op chooses by itself."""

    @abc.abstractmethod
    def cost(self, *, gpu: Gpu) -> Cost:
        """Count what the case costs with those tile sizes."""

    def draw(self, seed: int = 0) -> tuple[Any, ...]:
        """Return random arguments: normal numbers, and the case's own integers."""
        rng, integers = np.random.default_rng(seed), iter(self.integers())

        def one(shape: jax.ShapeDtypeStruct):
            if jnp.issubdtype(shape.dtype, jnp.integer):
                return jnp.asarray(next(integers), shape.dtype)
            return jnp.asarray(rng.standard_normal(shape.shape, np.float32), shape.dtype)

        return jax.tree.map(one, self.shapes())

    def array(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Return a description of an array in the case's dtype."""
        return jax.ShapeDtypeStruct(shape, self.dtype)


def per_row(batch: int) -> jax.ShapeDtypeStruct:
    """Return a description of one number per row."""
    return jax.ShapeDtypeStruct((batch,), jnp.int32)

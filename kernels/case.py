"""What a named case of an op is: one list of them feeds tests, compile checks and benchmarks."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from kernels import tiles
from kernels.dispatch import Implementation
from kernels.gpu import Gpu
from kernels.packed import Packed


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

    @property
    def vector_bytes(self) -> int:
        """Bytes of one query, or of an output."""
        return self.head_dim * self.itemsize

    @property
    def kv_bytes(self) -> float:
        """Bytes of a token's key and value in one head."""
        return 2.0 * self.vector_bytes

    @property
    def columns(self) -> int:
        """Columns of the tiles of vectors that are multiplied for head_dim."""
        return tiles.width(self.head_dim)

    def loaded_bytes(self, num_tokens: int, block_kv: int) -> float:  # noqa: ARG002
        """Return the bytes of the first keys and values of a head, as a kernel loads them."""
        return num_tokens * self.kv_bytes

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

        def one(shape: jax.ShapeDtypeStruct | Packed):
            if isinstance(shape, Packed):
                words = rng.integers(2**32, size=shape.words.shape, dtype=np.uint32)
                return fill(shape, words, rng.random(shape.scales.shape, np.float32))
            if jnp.issubdtype(shape.dtype, jnp.integer):
                return jnp.asarray(next(integers), shape.dtype)
            return jnp.asarray(rng.standard_normal(shape.shape, np.float32), shape.dtype)

        return jax.tree.map(one, self.shapes(), is_leaf=lambda x: isinstance(x, Packed))

    def array(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Return a description of an array in the case's dtype."""
        return jax.ShapeDtypeStruct(shape, self.dtype)


def fill(
    shape: Packed,
    words: UInt32[Array | np.ndarray, "batch kv_heads word_slots words"],
    uniform: Float[Array | np.ndarray, "batch kv_heads scale_slots scales"],
) -> Packed:
    """Return packed numbers of about size 1, made of random bits and numbers in [0, 1)."""
    scales = (uniform + 0.5) * (1.7 / shape.layout.middle)
    return Packed(
        words=jnp.asarray(words),
        scales=jnp.asarray(scales, jnp.float16),
        zeros=jnp.asarray(-shape.layout.middle * scales, jnp.float16),
        layout=shape.layout,
    )


def per_row(batch: int) -> jax.ShapeDtypeStruct:
    """Return a description of one number per row."""
    return jax.ShapeDtypeStruct((batch,), jnp.int32)

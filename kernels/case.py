"""Named cases of the ops: the one list that feeds tests, compile checks and benchmarks."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

from kernels import dense
from kernels.dispatch import Implementation
from kernels.equivalent import Equivalent
from kernels.gpu import Gpu
from kernels.packed import Packed, unpack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The least that any kernel must do for a case."""

    flops: float  # 2 per multiply-add, of visible (query, key) pairs only
    num_bytes: float  # every input read once, every output written once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a case that is a case by itself."""

    name: str
    case: "Case"
    first: int | None = None  # query tokens first .. end - 1; None: all
    end: int | None = None

    @property
    def rows(self) -> Any:
        """Index of the piece's part of the outputs."""
        return slice(None) if self.first is None else (slice(None), slice(self.first, self.end))

    def arguments(self, *whole: Any) -> tuple[Any, ...]:
        """Return the piece's arguments, given those of the case."""
        if self.first is None:
            return whole
        q, k, v, starts, *table = whole
        return q[:, self.first : self.end], k, v, starts + self.first, *table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(abc.ABC):
    """One call of an op. Subclasses add the sizes."""

    q_heads: int
    kv_heads: int
    head_dim: int = 128
    dtype: str = "bfloat16"
    compile_only: bool = False  # too large for the interpreter
    gradient: ClassVar[bool] = False  # whether `run` returns the gradients of q, k and v instead
    bits: ClassVar[int | None] = None  # of packed keys and values

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def vector_bytes(self) -> int:
        """Bytes of one query, or of an output."""
        return self.head_dim * jnp.dtype(self.dtype).itemsize

    @abc.abstractmethod
    def shapes(self) -> tuple[Any, ...]:
        """Return the arguments of `run` as jax.ShapeDtypeStruct."""

    @abc.abstractmethod
    def integers(self) -> list[np.ndarray]:
        """Return the values of the integer arguments, in the order of `shapes`."""

    @abc.abstractmethod
    def run(self, *arguments: Any, implementation: Implementation, tiles: Any = None) -> Any:
        """Call the op; tile sizes are the op's own choice unless given."""

    @abc.abstractmethod
    def tiles(self, *, gpu: Gpu) -> Any:
        """Return the tile sizes that the op chooses by itself."""

    @abc.abstractmethod
    def other_tiles(self, *, gpu: Gpu) -> Sequence[Any]:
        """Return tile sizes that may be faster."""

    @abc.abstractmethod
    def cost(self) -> Cost:
        """Count the least work."""

    @abc.abstractmethod
    def expected(
        self, arguments: tuple[Any, ...], *, rounded_to: DTypeLike | None = None
    ) -> tuple[np.ndarray, ...]:
        """Return what `run` must return, in float64, or with `rounded_to` as kernels.dense has it.

        That is (out, lse), (out,) or the gradients of q, k and v.
        """

    @abc.abstractmethod
    def equivalent(self, arguments: tuple[Any, ...]) -> Equivalent:
        """Put arguments in the layout that other libraries take.

        Raises:
          UnsuitableError: no calls of theirs do this work.
        """

    def pieces(self) -> list[Piece]:
        """Return the parts that are compared with XLA on a GPU; together they stand for all."""
        return [Piece(name="all", case=self)]

    def mosaic_tiles(self, *, gpu: Gpu) -> list[Any]:
        """Return tile sizes of the Mosaic kernel, the op's own choice first; none without one."""
        del gpu
        return []

    def candidates(self, *, gpu: Gpu, mosaic: bool = False) -> list[Any]:
        """Return tile sizes to time: the op's own choice, then the others, most similar first."""
        if mosaic:
            found = self.mosaic_tiles(gpu=gpu)
        else:
            found = [self.tiles(gpu=gpu), *self.other_tiles(gpu=gpu)]
        return sorted(dict.fromkeys(found), key=lambda tiles: _differences(tiles, found[0]))

    def with_stale(
        self, arguments: tuple[Any, ...], *, keys: float = dense.STALE, values: float = -dense.STALE
    ) -> tuple[Any, ...]:
        """Return arguments with stale keys and values in all slots that no query sees.

        Packed keys and values get stale scales instead.
        """
        del keys, values
        return arguments

    def draw(self, seed: int = 0) -> tuple[Any, ...]:
        """Return random arguments: normal numbers, stale ones unseen, the case's own integers."""
        rng, integers = np.random.default_rng(seed), iter(self.integers())

        def one(shape: jax.ShapeDtypeStruct | Packed) -> np.ndarray | Packed:
            if isinstance(shape, Packed):
                words = rng.integers(2**32, size=shape.words.shape, dtype=np.uint32)
                return fill(shape, words, rng.random(shape.scales.shape, np.float32))
            if jnp.issubdtype(shape.dtype, jnp.integer):
                return next(integers).astype(shape.dtype)
            return rng.standard_normal(shape.shape, np.float32).astype(shape.dtype)

        drawn = jax.tree.map(one, self.shapes(), is_leaf=lambda x: isinstance(x, Packed))
        return jax.device_put(self.with_stale(drawn))  # jnp.asarray would compile a program a shape

    def array(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Return a description of an array in the case's dtype."""
        return jax.ShapeDtypeStruct(shape, self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """A call whose first arguments are q, k and v."""

    returns_lse: ClassVar[bool] = True

    @property
    def kv_bytes(self) -> float:
        """Bytes of a token's key and value in one head."""
        return 2.0 * self.vector_bytes

    @abc.abstractmethod
    def parts(self, arguments: tuple[Any, ...]) -> list[dense.Part]:
        """Return the keys that queries meet, given numpy arguments, unpacked."""

    def expected(
        self, arguments: tuple[Any, ...], *, rounded_to: DTypeLike | None = None
    ) -> tuple[np.ndarray, ...]:
        arguments = to_numpy(arguments)
        parts, q, scale = self.parts(arguments), arguments[0], self.softmax_scale
        if self.gradient:
            return dense.gradients(q, parts[0], arguments[3], softmax_scale=scale)
        results = dense.attend(q, parts, softmax_scale=scale, rounded_to=rounded_to)
        return results if self.returns_lse else results[:1]

    def cost_of(self, *, pairs: int, queries: int, keys: int) -> Cost:
        """Count the least work.

        A gradient takes seven products of queries and keys instead of two. It reads what the
        forward pass read and wrote, and the output's gradient, and writes those of q, k and v.

        Args:
          pairs: visible (query, key) pairs of one head, of all rows.
          queries: query tokens of all rows.
          keys: tokens of all rows that some query sees.
        """
        qs = queries * self.q_heads * self.vector_bytes
        kvs = keys * self.kv_heads * self.kv_bytes
        lses = 4.0 * queries * self.q_heads * (self.returns_lse or self.gradient)
        products, num_bytes = (7, 6 * qs + 3 * kvs + 2 * lses) if self.gradient else (
            2, 2 * qs + kvs + lses
        )  # fmt: skip
        return Cost(
            flops=2.0 * products * pairs * self.q_heads * self.head_dim, num_bytes=num_bytes
        )


_unpack = jax.jit(unpack)


def to_numpy(arguments: Any) -> Any:
    """Return a tree with numpy arrays, packed ones unpacked."""
    return jax.tree.map(
        lambda x: np.asarray(_unpack(x) if isinstance(x, Packed) else x),
        arguments,
        is_leaf=lambda x: isinstance(x, Packed),
    )


def fill(
    shape: Packed,
    words: UInt32[Array | np.ndarray, "batch kv_heads word_slots words"],
    uniform: Float[Array | np.ndarray, "batch kv_heads scale_slots scales"],
) -> Packed:
    """Return packed numbers of about size 1, made of random bits and numbers in [0, 1)."""
    scales = (uniform + 0.5) * (1.7 / shape.layout.middle)
    return Packed(
        words=jax.device_put(words),
        scales=jax.device_put(scales.astype(jnp.float16)),
        zeros=jax.device_put((-shape.layout.middle * scales).astype(jnp.float16)),
        layout=shape.layout,
    )


def per_row(batch: int) -> jax.ShapeDtypeStruct:
    """Return a description of one integer per row."""
    return jax.ShapeDtypeStruct((batch,), jnp.int32)


def _differences(tiles: Any, chosen: Any) -> int:
    """Count the fields in which tile sizes differ."""
    if not dataclasses.is_dataclass(tiles):
        return int(tiles != chosen)
    names = [field.name for field in dataclasses.fields(tiles)]
    return sum(_differences(getattr(tiles, name), getattr(chosen, name)) for name in names)

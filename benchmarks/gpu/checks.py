"""Every kernel against XLA on the device at hand: fresh random inputs, poisoned outputs.

A case passes if, for every output (and gradient),

- its error is at most twice (a gradient's: three times) that of the XLA version in the same dtype,
  both against XLA in float32 with exact products; errors are norm(x - reference) /
  norm(reference);
- it is the same to the bit when memory held other numbers before: all of it was written, and
  programs do not race. The output lies in a donated buffer full of the poison, temporary buffers in
  freed memory full of it. An output that lies elsewhere fails: nothing was shown of it.

tests/kernels/test_gpu.py calls `check` for every case; the report does so by its own loop, since
the machine it runs on may lack pytest.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import arrays
from kernels import compat
from kernels.case import Case
from kernels.dispatch import Implementation

MAX_RATIO = 2.0
# Kernels round weights and their gradients to the dtype; of a few tokens XLA fuses the products.
_MAX_RATIO_OF_GRADIENTS = 3.0
# Sums in another order differ by this much in float32; where XLA is exact, so much is allowed.
_SLACK = 4e-6
_POISONS = (float("nan"), 3e4)  # the second fits in float16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled programs of a check."""

    kernel: jax.stages.Compiled  # (buffers for the outputs, *arguments) -> outputs
    outputs: Any  # their shapes
    plain: list[jax.stages.Compiled]  # per piece: XLA in the case's dtype
    exact: list[jax.stages.Compiled]  # per piece: XLA in float32


def check(case: Case, *, seed: int, implementation: Implementation = "triton") -> dict[str, Any]:
    """Compile and check a case; see the module's docstring.

    Returns:
      Whether it passed, what failed, and per output the errors of the kernel and of XLA.
    """
    return run(case, compiled(case, implementation), seed=seed)


def compiled(case: Case, implementation: Implementation) -> Programs:
    """Compile a case's programs; several threads may do so at once."""
    shapes = case.shapes()

    def kernel(buffers, *arguments):
        del buffers  # donated: the outputs take their place
        return case.run(*arguments, implementation=implementation)

    outputs = jax.eval_shape(lambda *arguments: kernel(None, *arguments), *shapes)
    program = jax.jit(kernel, donate_argnums=0, keep_unused=True).lower(outputs, *shapes).compile()
    plain, exact = [], []
    for piece in case.pieces():
        arguments = jax.eval_shape(piece.arguments, *shapes)
        with _same_products(case):
            plain.append(_xla(piece.case, arguments))
        with jax.default_matmul_precision("highest"):
            exact.append(_xla(piece.case, jax.eval_shape(arrays.upcast, arguments)))
    return Programs(kernel=program, outputs=outputs, plain=plain, exact=exact)


def run(case: Case, programs: Programs, *, seed: int) -> dict[str, Any]:
    """Check a case by its compiled programs."""
    arguments = arrays.draw(case, seed)
    memory = programs.kernel.memory_analysis()
    scratch = 0 if memory is None else memory.temp_size_in_bytes
    runs, unpoisoned = [], set()
    for poison in _POISONS:
        buffers = arrays.filled_like(programs.outputs, poison)
        donated = set(_addresses(buffers))
        arrays.scribble(scratch, poison)
        runs.append(jax.block_until_ready(programs.kernel(buffers, *arguments)))
        addresses = enumerate(_addresses(runs[-1]))
        unpoisoned |= {i for i, address in addresses if address not in donated}
    problems = [
        f"output {i} did not take the place of its poisoned buffer" for i in sorted(unpoisoned)
    ]
    for i, (first, second) in enumerate(zip(*map(jax.tree.leaves, runs), strict=True)):
        if not _same(first, second):
            problems.append(f"output {i} depends on what its memory held before, or on chance")
    outs = jax.tree.leaves(runs[0])
    del runs

    ratio = _MAX_RATIO_OF_GRADIENTS if case.gradient else MAX_RATIO
    errors = [(0.0, 0.0)] * len(outs)
    for piece, plain, exact in zip(case.pieces(), programs.plain, programs.exact, strict=True):
        mine = piece.arguments(*arguments)
        xla = jax.tree.leaves(plain(*mine))
        expected = jax.tree.leaves(exact(*arrays.upcast(mine)))
        for i, (out, other, reference) in enumerate(zip(outs, xla, expected, strict=True)):
            part = out if piece.first is None else out[piece.rows]
            pair = error(part, reference), error(other, reference)
            errors[i] = max(errors[i][0], pair[0]), max(errors[i][1], pair[1])
            if not pair[0] <= max(ratio * pair[1], _SLACK):  # nan fails
                problems.append(
                    f"output {i}: error {pair[0]:.2e}, XLA's {pair[1]:.2e} ({piece.name})"
                )
    return {
        "passed": not problems,
        "problems": problems,
        "errors": [pair[0] for pair in errors],
        "xla_errors": [pair[1] for pair in errors],
        "compared": [piece.name for piece in case.pieces()],
        "outputs": len(outs),
        "outputs_in_poisoned_buffers": len(outs) - len(unpoisoned),
        "seed": seed,
    }


def _addresses(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def error(out: jax.Array, reference: jax.Array) -> float:
    """Return norm(out - reference) / norm(reference); infinite where -inf is not in its place."""
    if arrays.is_small((out, reference)):
        return float(_error(np.asarray(out), np.asarray(reference), np))
    return float(_error_on_device(out, reference))


def _error(out, reference, xp=jnp):
    out, reference = out.astype(xp.float32), reference.astype(xp.float32)
    nothing = xp.isneginf(reference)  # the lse of a row that saw no key
    misplaced = xp.any(nothing != xp.isneginf(out))
    expected = xp.where(nothing, 0.0, reference)
    difference = xp.where(nothing, 0.0, xp.where(nothing, 0.0, out) - expected)
    size = xp.linalg.norm(expected.reshape(-1))
    away = xp.linalg.norm(difference.reshape(-1))
    relative = away / xp.where(size == 0, 1.0, size)
    return xp.where(misplaced, xp.inf, relative)


_error_on_device = jax.jit(_error)


def _same(first: jax.Array, second: jax.Array) -> bool:
    if arrays.is_small((first, second)):
        return np.asarray(first).tobytes() == np.asarray(second).tobytes()
    return bool(jnp.array_equal(first, second, equal_nan=True))


def _xla(case: Case, arguments: Any) -> jax.stages.Compiled:
    program = jax.jit(lambda *arguments: case.run(*arguments, implementation="xla"))
    # Each runs once: searching for the fastest matrix products takes longer.
    options: dict[str, Any] = {"xla_gpu_autotune_level": 0}
    return program.lower(*arguments).compile(compiler_options=options)


def _same_products(case: Case):
    """Let XLA multiply float32 as kernels do on GPUs: rounded to TF32, summed in float32."""
    if case.dtype == np.float32 and compat.target_gpu() is not None:
        return jax.default_matmul_precision("TF32_TF32_F32")
    return contextlib.nullcontext()

"""Times of work on a device, which runs after its call has returned."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compile import roofline
from benchmarks.serving import timing
from kernels.case import Case
from kernels.gpu import H200

_SHORT = 300e-6  # seconds; below, calls are not dispatched as fast as they run
LOOPS = 64  # calls in one program, where one is short


def seconds_per_call(
    call: Callable[[], Any],
    *,
    seconds: float,
    rounds: int = 5,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, float]:
    """Time calls that are dispatched one after the other, and waited for once per round.

    Args:
      call: starts the work and returns what to wait for; compiled already.
      seconds: about how long to measure.
      rounds: the median of this many counts.
      wait: waits for what `call` returned.

    Returns:
      Seconds per call: median and quartiles; and `calls`, the calls of one round.
    """
    for _ in range(2):
        wait(call())
    began = time.perf_counter()
    wait(call())
    once = time.perf_counter() - began
    calls = max(1, min(1000, int(seconds / rounds / once)))
    measured = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        measured.append((time.perf_counter() - began) / calls)
    return timing.summary(measured) | {"calls": calls}


def loops(case: Case) -> int:
    """Return how many calls of a case are measured in one program, on the fastest GPU or less."""
    cost = case.cost()
    floor = roofline.floor(H200, cost.flops, cost.num_bytes)["seconds"]
    return LOOPS if floor < _SHORT else 1


def of_function(function: Callable[..., Any], *args: Any, seconds: float) -> dict[str, float]:
    """Time a function of arrays; its first result has the shape of its first argument.

    Where a call is shorter than its dispatch, many run within one program.
    """
    result = of_program(compiled(function, *args), *args, seconds=seconds)
    if result["median"] > _SHORT:
        return result
    program = compiled(function, *args, loops=LOOPS)
    return of_program(program, *args, seconds=seconds, loops=LOOPS)


def compiled(function: Callable[..., Any], *args: Any, loops: int = 1) -> jax.stages.Compiled:
    """Compile a function, or a loop of its calls, each with a query that the one before changed.

    Args:
      function: of arrays; its first result has the shape of its first argument.
      *args: arrays, or descriptions of arrays.
      loops: calls in one program.
    """

    def loop(first, *rest):
        def again(_, x):
            out = jax.tree.leaves(function(x, *rest))[0]
            return x + out * jnp.asarray(1e-3, x.dtype)

        return jax.lax.fori_loop(0, loops, again, first)

    return jax.jit(function if loops == 1 else loop).lower(*args).compile()


def of_program(
    program: jax.stages.Compiled, *args: Any, seconds: float, loops: int = 1, rounds: int = 5
) -> dict[str, float]:
    """Time what `compiled` returned; per call of the function."""
    result = seconds_per_call(lambda: program(*args), seconds=seconds, rounds=rounds)
    for key in ("median", "low", "high"):
        result[key] /= loops
    return result | {"loops": loops}

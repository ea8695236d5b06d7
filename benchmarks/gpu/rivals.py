"""The same attention by other libraries, each in the layout it likes, put there beforehand."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import timers
from kernels.case import Case
from kernels.equivalent import Call, Equivalent, UnsuitableError


def masking(call: Call) -> dict[str, Any]:
    """Return how jax.nn.dot_product_attention is told what a call's queries see."""
    window = None if call.window is None else (call.window - 1, 0)
    return {"is_causal": call.causal, "local_window_size": window}


def jax_attention(implementation: str, case: Case, work: Equivalent, *, seconds: float):
    """Time jax.nn.dot_product_attention."""
    if implementation == "xla":
        _refuse_large_scores(work)

    times = []
    for call in work.calls:
        function = functools.partial(
            jax.nn.dot_product_attention,
            scale=case.softmax_scale,
            implementation=implementation,
            **masking(call),
        )
        arguments = (call.q, call.k, call.v)
        if call.d_out is not None:
            forward, arguments = function, (*arguments, call.d_out)

            def function(q, k, v, d_out, forward=forward):
                return jax.vjp(forward, q, k, v)[1](d_out)

        times.append(timers.of_function(function, *arguments, seconds=seconds))
    return _total(times)


def torch_attention(case: Case, work: Equivalent, *, seconds: float):
    """Time torch.nn.functional.scaled_dot_product_attention, on the same memory."""
    try:
        import torch
    except ImportError:
        raise UnsuitableError("torch is not installed") from None
    if not torch.cuda.is_available():
        raise UnsuitableError("torch has no CUDA device here")
    times = []
    for call in work.calls:
        if call.window is not None:
            raise UnsuitableError("no sliding window")
        if call.d_out is not None:
            raise UnsuitableError("its gradients are not timed")
        q, k, v = (
            torch.from_dlpack(jax.block_until_ready(jnp.swapaxes(x, 1, 2)))
            for x in (call.q, call.k, call.v)
        )
        attend = functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            q,
            k,
            v,
            is_causal=call.causal,
            scale=case.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        with torch.no_grad():
            time = timers.seconds_per_call(
                attend, seconds=seconds, wait=lambda _: torch.cuda.synchronize()
            )
        times.append(time)
    return _total(times)


TIMERS: dict[str, Callable[..., dict[str, float]]] = {
    "jax.nn cudnn": functools.partial(jax_attention, "cudnn"),
    "jax.nn xla": functools.partial(jax_attention, "xla"),
    "torch SDPA": torch_attention,
}


def _total(times: list[dict[str, float]]) -> dict[str, float]:
    """Return the time of calls that follow each other."""
    return times[0] | {key: sum(time[key] for time in times) for key in ("median", "low", "high")}


def _refuse_large_scores(work: Equivalent) -> None:
    """XLA holds all scores, in float32 and again in the dtype; it must not fill the memory."""
    scores = max(call.q.shape[0] * call.q.shape[2] * call.q.shape[1] * call.k.shape[1] for call in
                 work.calls)  # fmt: skip
    needed = scores * (4 + 4 + work.calls[0].q.dtype.itemsize)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and needed > limit / 2:
        raise UnsuitableError(f"its scores would take {needed / 1e9:,.0f} GB")

"""The Mosaic kernels: run on a CPU with race detection, compiled for an H200, refused by name.

By default the smaller cases of every op; the slow tests run all. In tiles that no query sees there
are NaNs: a kernel that loaded one of these would return NaN, as 0 times NaN is NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels import compat, merge_lse
from kernels.all_cases import named, served_by_mosaic
from kernels.decode.cases import DecodeCase
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import StreamingCase
from kernels.tiles import AttentionTiles, DecodeTiles, ForwardBackwardTiles

pytestmark = pytest.mark.core

needs_mosaic = pytest.mark.skipif(
    compat.no_mosaic() is not None, reason=f"Mosaic {compat.no_mosaic()}"
)
HEADS = {"q_heads": 4, "kv_heads": 2, "head_dim": 64}
WIDE = HEADS | {"head_dim": 128}
MORE = {
    "decode, pages of 64": DecodeCase(lengths=(130, 0, 64), slots=192, page_size=64, **HEADS),
    "decode, pages of 128": DecodeCase(lengths=(255,), slots=256, page_size=128, **HEADS),
    "prefill, pages of 64": PrefillCase(
        starts=(100, 3), length=20, slots=128, page_size=64, **HEADS
    ),
    "decode, int8": DecodeCase(lengths=(130, 0), slots=192, bits=8, **HEADS),
    "decode, int8, head_dim 128": DecodeCase(lengths=(130,), slots=192, bits=8, **WIDE),
    "decode, int4": DecodeCase(lengths=(130, 0), slots=192, bits=4, **WIDE),
    "decode, int4, pages of 64": DecodeCase(
        lengths=(100,), slots=128, bits=4, page_size=64, **WIDE | {"dtype": "float16"}
    ),
}


CASES = MORE | {
    name: case for name, case in named().items() if served_by_mosaic(case) and not case.compile_only
}
# Each of the others takes more than two seconds.
DEFAULT = {
    "decode: one token",
    "decode: empty rows",
    "full: three tokens",
    "prefill: three tokens, ragged",
    "streaming: one token before the sinks' end",
    *MORE,
}


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in DEFAULT else [pytest.mark.slow]


def run(case, arguments, tiles=None):
    call = functools.partial(case.run, implementation="interpret_mosaic", tiles=tiles)
    return jax.jit(call)(*arguments)


def error(got, want) -> float:
    got = np.asarray(got, np.float64)
    return np.abs(np.subtract(got, want, out=np.zeros_like(got), where=got != want)).max()  # -inf


def check(case, arguments, results):
    """The output errs at most twice as much as a program of its dtype, the lse as float32 does.

    Packed keys and values are rounded to that dtype, as XLA rounds them.
    """
    wanted = case.expected(arguments)
    if case.bits is not None:
        xla = case.run(*arguments, implementation="xla")
        for got, other, want in zip(results, xla, wanted, strict=True):
            assert error(got, want) <= 2 * error(other, want) + 2e-6
        return
    rounded = case.expected(arguments, rounded_to=case.dtype)
    assert [x.shape for x in results] == [x.shape for x in wanted]
    assert results[0].dtype == jnp.dtype(case.dtype)
    assert error(results[0], wanted[0]) <= 2 * error(rounded[0], wanted[0]) + 2e-6
    for lse, want in zip(results[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(lse, want, atol=1e-5, rtol=2e-6)


@needs_mosaic
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=marks(name)) for name, case in CASES.items()]
)
def test_a_kernel_matches_float64_without_a_data_race(case):
    arguments = case.draw()
    check(case, arguments, run(case, arguments))


def two_stages(block_q: int) -> AttentionTiles:
    return AttentionTiles(block_q=block_q, block_kv=64, num_warps=12, num_stages=2)


@needs_mosaic
def test_decode_loads_no_tile_beyond_a_row_and_walks_more_tiles_than_stages():
    case = DecodeCase(lengths=(200,), slots=320, **HEADS)
    q, k, v, lengths = case.draw()
    poisoned = (q, *(x.at[:, :, 256:].set(jnp.nan) for x in (k, v)), lengths)
    for splits in (1, 3):
        tiles = DecodeTiles(block_kv=64, num_splits=splits, num_warps=8, num_stages=2)
        check(case, (q, k, v, lengths), run(case, poisoned, tiles))


@needs_mosaic
def test_prefill_of_two_warpgroups_loads_no_tile_beyond_the_diagonal():
    case = PrefillCase(starts=(130,), length=70, slots=320, q_heads=1, kv_heads=1, head_dim=64)
    q, k, v, starts = case.draw()
    poisoned = (q, *(x.at[:, :, 256:].set(jnp.nan) for x in (k, v)), starts)
    check(case, (q, k, v, starts), run(case, poisoned, two_stages(128)))


@needs_mosaic
def test_streaming_loads_no_tile_between_sinks_and_window():
    case = StreamingCase(length=200, sink_size=3, recent_size=5, q_heads=1, kv_heads=1, head_dim=64)
    q, k, v = case.draw()
    tiles = ForwardBackwardTiles(forward=two_stages(64), backward=two_stages(64))
    results = run(case, (q, k, v), tiles)
    check(case, (q, k, v), results)
    poisoned = run(case, (q, *(x.at[:, 3:128].set(jnp.nan) for x in (k, v))), tiles)
    # The windows of the last eight queries begin in the tile of tokens 128 to 191.
    for got, want in zip(poisoned, results, strict=True):
        np.testing.assert_array_equal(got[:, 192:], want[:, 192:])


@needs_mosaic
def test_a_tile_that_is_overwritten_while_it_may_be_read_is_a_race(monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    plgpu = compat.mosaic()
    wait = plgpu.barrier_wait
    monkeypatch.setattr(
        plgpu,
        "barrier_wait",
        # Only the loader waits for two arrivals: both warpgroups have read a tile.
        lambda barrier: None if barrier.dtype.num_arrivals == 2 else wait(barrier),
    )
    case = PrefillCase(starts=(130,), length=70, slots=200, q_heads=1, kv_heads=1, head_dim=64)
    arguments = case.draw()
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(run(case, arguments, two_stages(128)))
    interpreter.reset_gpu_interpret_mode_state()


@needs_mosaic
@pytest.mark.parametrize("op", ["full", "streaming"])
def test_gradients_are_refused_by_name(op):
    case = next(case for name, case in named().items() if name.startswith(op) and case.gradient)
    case = dataclasses.replace(case, dtype="bfloat16", head_dim=64)
    run = functools.partial(case.run, implementation="interpret_mosaic")
    with pytest.raises(NotImplementedError, match="no gradients; implementation='triton' and"):
        jax.eval_shape(run, *case.shapes())


REFUSED = {
    "float32": (DecodeCase(lengths=(3,), slots=8, dtype="float32", **HEADS), "bfloat16 and float1"),
    "head_dim 80": (
        DecodeCase(lengths=(3,), slots=8, q_heads=4, kv_heads=2, head_dim=80), "80, Mosaic .* 64"
    ),
    "int2": (DecodeCase(lengths=(3,), slots=64, bits=2, **WIDE), "does not read 2 bits"),
    "int4 of head_dim 64": (
        DecodeCase(lengths=(3,), slots=64, bits=4, **HEADS), "read 4 bits of head_dim 64"
    ),
    "prefill of packed keys": (
        PrefillCase(starts=(0,), length=3, slots=64, bits=8, **WIDE), "does not read packed keys"
    ),
    "many queries of a head": (
        DecodeCase(lengths=(3,), slots=8, q_heads=65, kv_heads=1, head_dim=64), "65 query heads"
    ),
}  # fmt: skip


@needs_mosaic
@pytest.mark.parametrize(("case", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_mosaic_kernel_takes_is_refused_with_the_reason(case, reason):
    run = functools.partial(case.run, implementation="interpret_mosaic")
    with pytest.raises(NotImplementedError, match=f"implementation='interpret_mosaic': .*{reason}"):
        jax.eval_shape(run, *case.shapes())


@needs_mosaic
def test_merging_parts_has_no_mosaic_kernel():
    outs, lses = jnp.ones((2, 3, 16)), jnp.ones((2, 3))
    with pytest.raises(NotImplementedError, match="merge_lse has no Mosaic kernel"):
        merge_lse(outs, lses, implementation="interpret_mosaic")


DECODE = CASES["decode: one token"]


def refusal(implementation: str, gpu: str | None = None) -> str:
    """Return why an implementation cannot decode, for a described GPU or for the CPU."""
    mesh = jax.sharding.get_abstract_mesh()
    if gpu is not None:
        device = AbstractDevice(device_kind=gpu, num_cores=108, platform="gpu")
        mesh = AbstractMesh((), (), abstract_device=device)
    run = functools.partial(DECODE.run, implementation=implementation)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(NotImplementedError) as raised:
        jax.eval_shape(run, *DECODE.shapes())
    return str(raised.value)


@pytest.mark.skipif(compat.no_mosaic() is None, reason="this jax has Mosaic's interpreter")
@pytest.mark.parametrize("implementation", ["mosaic", "interpret_mosaic"])
def test_an_older_jax_refuses_mosaic_with_the_reason(implementation):
    said = refusal(implementation, "NVIDIA H200")
    assert said == f"implementation='{implementation}' {compat.no_mosaic()}"
    assert "jax 0.12 or newer" in said
    assert jax.__version__ in said


@needs_mosaic
def test_mosaic_needs_a_hopper():
    assert refusal("mosaic").endswith(
        "needs a Hopper GPU (H100, H200), and this process runs on cpu"
    )
    assert refusal("mosaic", "NVIDIA A100-SXM4-80GB").endswith("not NVIDIA A100-SXM4-80GB")


@needs_mosaic
@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
def test_auto_takes_mosaic_on_a_hopper_without_triton_only(monkeypatch, gpu, has_triton):
    if not has_triton:
        monkeypatch.setattr(compat, "no_triton", lambda: "is blocked")
    mesh = AbstractMesh(
        (), (), abstract_device=AbstractDevice(device_kind=gpu, num_cores=108, platform="gpu")
    )
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(
            jax.make_jaxpr(functools.partial(DECODE.run, implementation="auto"))(*DECODE.shapes())
        )
    assert ("duo_decode_mosaic" in text) == (not has_triton and "H200" in gpu)
    assert ("duo_decode" in text) == (has_triton or "H200" in gpu)


@needs_mosaic
def test_tiles_of_no_warpgroup_are_a_mistake():
    case = PrefillCase(starts=(0,), length=8, slots=8, **HEADS)
    with pytest.raises(ValueError, match="have not 64 or 128 queries"):
        jax.eval_shape(
            functools.partial(case.run, implementation="interpret_mosaic", tiles=two_stages(32)),
            *case.shapes(),
        )

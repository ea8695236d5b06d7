"""Which implementation runs: names are obeyed or refused with a reason, "auto" always serves."""

import contextlib
import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels import compat, decode_attention, limits, prefill_attention, streaming_attention
from kernels.all_cases import CASES, named
from kernels.gpu import Gpu

pytestmark = pytest.mark.core

GPUS = {
    "A100": AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu"),
    "H100": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
}
KERNELS = {
    "decode": "duo_decode",
    "decode_packed": "duo_decode_packed",
    "full": "duo_prefill",
    "merge": "duo_merge",
    "prefill": "duo_prefill",
    "prefill_packed": "duo_prefill",
    "streaming": "duo_streaming",
}
# By default one case of every kind of every op, on each GPU in turn; the slow tests run all.
# test_compiled.py lowers every case for two GPUs.
LOWERED, _kinds = [], set()
for (_name, _case), _gpu in zip(
    (x for x in named().items() if any(y in x[0] for y in ("llama", "float32", "head_dim"))),
    itertools.cycle(GPUS),
    strict=False,
):
    _op = _name.partition(":")[0]
    _new = {
        (_op, _case.gradient, kind)
        for kind in ("llama", "float32", "head_dim", f"int{_case.bits}")
        if kind in _name
    } - _kinds
    _kinds |= _new
    _marks = [] if _new else [pytest.mark.slow]
    LOWERED.append(pytest.param(_op, _case, _gpu, id=f"{_name}, {_gpu}", marks=_marks))


@contextlib.contextmanager
def described(gpu: str):
    """Trace for a GPU that is only described."""
    mesh = AbstractMesh((), (), abstract_device=GPUS[gpu])
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def lowered(function, *shapes, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def call(q_dtype, kv_dtype=None, *, head_dim=64, slots=40, kv_heads=2):
    """Return a call of decode, by implementation, and the shapes of its arrays."""
    q = jax.ShapeDtypeStruct((1, 8, head_dim), q_dtype)
    kv = jax.ShapeDtypeStruct((1, kv_heads, slots, head_dim), kv_dtype or q_dtype)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def of(implementation):
        return functools.partial(
            decode_attention, softmax_scale=0.125, implementation=implementation
        )

    return of, (q, kv, kv, lengths)


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("op", "case", "gpu"), LOWERED)
def test_kernels_can_be_lowered_for_a_gpu_and_auto_picks_them(op, case, gpu):
    with described(gpu):
        text = lowered(functools.partial(case.run, implementation="auto"), *case.shapes())
    assert KERNELS[op] in text
    assert "__gpu$xla.gpu.triton" in text


@pytest.mark.one_in(3)
@pytest.mark.parametrize("op", KERNELS)
def test_auto_is_xla_on_the_cpu_also_where_tracing_thought_of_a_gpu(op):
    case = next(case for name, case in CASES[op].items() if name.endswith("float32"))
    auto = functools.partial(case.run, implementation="auto")
    assert KERNELS[op] not in lowered(auto, *case.shapes(), platform="cpu")
    with described("A100"):
        assert KERNELS[op] not in lowered(auto, *case.shapes(), platform="cpu")


def test_unknown_names_are_refused():
    of, shapes = call(jnp.float32)
    with pytest.raises(Exception, match="cuda") as raised:  # the type checker may be first
        jax.eval_shape(of("cuda"), *shapes)
    assert not isinstance(raised.value, NotImplementedError)


@pytest.mark.parametrize("op", KERNELS)
def test_triton_without_a_gpu_says_so(op):
    case = next(case for name, case in CASES[op].items() if name.endswith("float32"))
    run = functools.partial(case.run, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA GPU, and .* runs on cpu"):
        jax.eval_shape(run, *case.shapes())


REFUSED = {
    "float64": (call(jnp.float64), "not float64"),
    "mixed dtypes": (call(jnp.float32, jnp.bfloat16), "queries are float32.* bfloat16"),
    "head_dim 512": (call(jnp.float32, head_dim=512), "head_dim is 512.* 256"),
    "2^31 elements": (call(jnp.bfloat16, slots=2**20, head_dim=256, kv_heads=8), "2,147,483,647"),
}


@pytest.mark.parametrize("implementation", ["triton", "interpret"])
@pytest.mark.parametrize(("called", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_kernel_takes_is_refused_by_name(called, reason, implementation):
    of, shapes = called
    with (
        jax.enable_x64("float64" in reason),
        described("A100"),
        pytest.raises(NotImplementedError, match=f"implementation='{implementation}': .*{reason}"),
    ):
        jax.eval_shape(of(implementation), *shapes)


@pytest.mark.parametrize("name", ["float64", "mixed dtypes", "head_dim 512"])
def test_auto_serves_what_no_kernel_takes_through_xla(name):
    (of, shapes), _ = REFUSED[name]
    with jax.enable_x64(name == "float64"), described("A100"):
        assert KERNELS["decode"] not in lowered(of("auto"), *shapes)
        out, lse = jax.eval_shape(of("auto"), *shapes)
    assert (out.shape, out.dtype, lse.shape) == (shapes[0].shape, shapes[0].dtype, (1, 8))


def test_auto_refuses_arrays_that_a_kernel_cannot_address_where_there_are_kernels():
    (of, shapes), _ = REFUSED["2^31 elements"]
    with (
        described("A100"),
        pytest.raises(
            NotImplementedError, match=r"implementation='auto': .*2,147,483,648 elements"
        ),
    ):
        jax.eval_shape(of("auto"), *shapes)
    with described("A100"):
        jax.eval_shape(of("xla"), *shapes)
    jax.eval_shape(of("auto"), *shapes)  # on the CPU


def test_gpus_before_the_a100_have_no_kernels(monkeypatch):
    def kernel_is_traced(of, shapes) -> bool:
        return KERNELS["decode"] in str(jax.make_jaxpr(of("auto"))(*shapes))

    old = Gpu(kind="Tesla T4", num_cores=40, compute_capability="7.5")
    monkeypatch.setattr(compat, "_present_gpu", lambda: old)
    of, shapes = call(jnp.float32)
    assert not kernel_is_traced(of, shapes)
    assert not kernel_is_traced(*REFUSED["2^31 elements"][0])
    with pytest.raises(NotImplementedError, match=r"capability 8\.0 .*; Tesla T4 has 7\.5"):
        jax.eval_shape(of("triton"), *shapes)
    new = dataclasses.replace(old, compute_capability="8.0")
    monkeypatch.setattr(compat, "_present_gpu", lambda: new)
    assert kernel_is_traced(of, shapes)


@pytest.mark.parametrize(
    ("kind", "capability", "too_old"),
    [
        ("NVIDIA H200", "9.0", False),
        ("NVIDIA A100-SXM4-80GB", None, False),
        ("Tesla V100-SXM2-16GB", "7.0", True),
        ("NVIDIA B200", "10.0", False),
        ("AMD Instinct MI300X", "gfx942", None),
    ],
)
def test_what_is_known_of_the_gpu_at_hand(monkeypatch, kind, capability, too_old):
    known = {} if capability is None else {"compute_capability": capability}
    device = types.SimpleNamespace(device_kind=kind, core_count=7, **known)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    gpu = compat._present_gpu.__wrapped__()
    assert (gpu is None) == (too_old is None)
    assert gpu is None or (gpu.kind, gpu.num_cores, gpu.is_too_old) == (kind, 7, too_old)


def test_one_element_less_than_2_to_the_31_is_taken():
    def refusal(slots: int) -> limits.Refusal | None:
        answers = []
        shapes = [jax.ShapeDtypeStruct((1, 1, n, 1), jnp.bfloat16) for n in (1, slots)]
        jax.eval_shape(lambda q, k: answers.append(limits.refusal(q, k, k)), *shapes)
        return answers[0]

    assert refusal(2**31 - 1) is None
    assert "2,147,483,648 elements" in refusal(2**31).reason
    of, shapes = call(jnp.bfloat16, slots=2**20 - 1, head_dim=256, kv_heads=8)
    with described("A100"):
        assert KERNELS["decode"] in lowered(of("triton"), *shapes)


def test_a_gradient_with_too_large_sums_over_the_sinks_is_refused():
    """They are larger than every argument: a sum for each part of the queries."""
    q = jax.ShapeDtypeStruct((1, 65_000, 32, 128), jnp.bfloat16)

    def attend(q, k, v, sink_size):
        options = {"recent_size": 256, "softmax_scale": 0.1, "implementation": "interpret"}
        out, _ = streaming_attention(q, k, v, sink_size=sink_size, **options)
        return jnp.sum(out.astype(jnp.float32))

    gradient = jax.grad(attend)
    jax.eval_shape(functools.partial(gradient, sink_size=128), q, q, q)
    with pytest.raises(NotImplementedError, match=r"duo_streaming_dsink: an array of shape .* end"):
        jax.eval_shape(functools.partial(gradient, sink_size=40_000), q, q, q)


def test_prefill_and_streaming_refuse_too_large_arrays():
    q = jax.ShapeDtypeStruct((1, 16, 8, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, 8, 2**21, 128), jnp.bfloat16)
    starts = jax.ShapeDtypeStruct((1,), jnp.int32)
    run = functools.partial(prefill_attention, softmax_scale=0.1, implementation="interpret")
    with pytest.raises(NotImplementedError, match="2,147,483,648 elements"):
        jax.eval_shape(run, q, kv, kv, starts)
    long = jax.ShapeDtypeStruct((1, 2**21, 8, 128), jnp.bfloat16)
    sizes = {"sink_size": 1, "recent_size": 2, "softmax_scale": 0.1}
    run = functools.partial(streaming_attention, **sizes, implementation="interpret")
    with pytest.raises(NotImplementedError, match="2,147,483,648 elements"):
        jax.eval_shape(run, long, long, long)

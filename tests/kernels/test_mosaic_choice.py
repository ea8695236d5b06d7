"""When Mosaic kernels run: by name, or refused with the reason; and what "auto" makes of them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from kernels import compat, dispatch
from kernels.all_cases import named
from kernels.decode.cases import DecodeCase
from kernels.mosaic import gradient
from kernels.prefill.cases import PrefillCase
from tests.kernels.mosaic_cases import (
    A100,
    CASES,
    H200,
    HEADS,
    described,
    marks,
    needs_mosaic,
    refusal,
    two_stages,
)

pytestmark = pytest.mark.core


@needs_mosaic
@pytest.mark.parametrize("op", ["full", "streaming"])
def test_gradients_are_refused_by_name(op):
    case = next(case for name, case in named().items() if name.startswith(op) and case.gradient)
    case = dataclasses.replace(case, dtype="bfloat16", head_dim=64)
    assert "no gradients; implementation='triton' and" in refusal("mosaic", H200, case)


@needs_mosaic
@pytest.mark.parametrize("op", ["full", "streaming"])
def test_auto_takes_gradients_from_xla_where_there_is_no_triton(monkeypatch, op):
    monkeypatch.setattr(compat, "no_triton", lambda: "is blocked")
    case = next(case for name, case in named().items() if name.startswith(op) and case.gradient)
    case = dataclasses.replace(case, dtype="bfloat16", head_dim=64)
    with described(H200):
        run = functools.partial(case.run, implementation="auto")
        text = str(jax.make_jaxpr(run)(*case.shapes()))
    assert f"duo_{op}_mosaic" in text
    assert f"duo_{op}_d" not in text


def test_a_kernel_has_the_gradient_of_its_reference():
    attend = gradient.by(lambda x, y: x * x * y, lambda x, y: 10 * x * y)
    value, (d_x, d_y) = jax.value_and_grad(attend, argnums=(0, 1))(jnp.float32(3), jnp.float32(2))
    assert (value, d_x, d_y) == (60, 12, 9)


REFUSED = {
    "float32": (DecodeCase(lengths=(3,), slots=8, dtype="float32", **HEADS), "bfloat16 and float1"),
    "head_dim 256": (
        DecodeCase(lengths=(3,), slots=8, q_heads=4, kv_heads=2, head_dim=256), "256, Mosaic .* 64"
    ),
    "int8 of head_dim 80": (
        DecodeCase(lengths=(3,), slots=64, bits=8, **HEADS | {"head_dim": 80}),
        "read 8 bits of head_dim 80",
    ),
    "int4 of head_dim 96": (
        DecodeCase(lengths=(3,), slots=64, bits=4, **HEADS | {"head_dim": 96}),
        "read 4 bits of head_dim 96",
    ),
    "int2 of head_dim 80": (
        DecodeCase(lengths=(3,), slots=64, bits=2, **HEADS | {"head_dim": 80}),
        "read 2 bits of head_dim 80",
    ),
    "many queries of a head": (
        DecodeCase(lengths=(3,), slots=8, q_heads=65, kv_heads=1, head_dim=64), "65 query heads"
    ),
}  # fmt: skip


@needs_mosaic
@pytest.mark.parametrize(("case", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_mosaic_kernel_takes_is_refused_with_the_reason(case, reason):
    assert re.search(f"implementation='mosaic': .*{reason}", refusal("mosaic", H200, case))


@needs_mosaic
def test_merging_parts_has_no_mosaic_kernel():
    case = next(case for name, case in named().items() if name.startswith("merge"))
    assert "merge_lse has no Mosaic kernel" in refusal("mosaic", H200, case)


@pytest.mark.skipif(compat.no_mosaic() is None, reason="this jax has Mosaic's interpreter")
@pytest.mark.parametrize("implementation", ["mosaic", "interpret_mosaic"])
def test_an_older_jax_refuses_mosaic_with_the_reason(implementation):
    said = refusal(implementation, H200)
    assert said == f"implementation='{implementation}' {compat.no_mosaic()}"
    assert "jax 0.11 or newer" in said
    assert jax.__version__ in said


@needs_mosaic
def test_mosaic_needs_a_hopper():
    assert refusal("mosaic").endswith(
        "needs a Hopper GPU (H100, H200), and this process runs on cpu"
    )
    assert refusal("mosaic", A100).endswith("not NVIDIA A100-SXM4-80GB")


@needs_mosaic
@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("gpu", [H200, A100])
def test_auto_takes_mosaic_on_a_hopper_without_triton_only(monkeypatch, gpu, has_triton):
    if not has_triton:
        monkeypatch.setattr(compat, "no_triton", lambda: "is blocked")
    elif compat.no_triton() is not None:
        pytest.skip(compat.no_triton())
    case = CASES["decode: one token"]
    with described(gpu):
        text = str(
            jax.make_jaxpr(functools.partial(case.run, implementation="auto"))(*case.shapes())
        )
    assert ("duo_decode_mosaic" in text) == (not has_triton and gpu == H200)
    assert ("duo_decode" in text) == (has_triton or gpu == H200)


@needs_mosaic
@pytest.mark.skipif(compat.no_triton() is not None, reason=str(compat.no_triton()))
@pytest.mark.parametrize("op", ["decode", "full", "streaming"])
def test_auto_prefers_what_was_measured_to_be_faster_and_triton_for_gradients(monkeypatch, op):
    def kernels_of(case) -> set[str]:
        with described(H200):
            run = functools.partial(case.run, implementation="auto")
            return set(re.findall(r"duo_\w+", str(jax.make_jaxpr(run)(*case.shapes()))))

    names = named()
    case = next(case for name, case in names.items() if name.startswith(f"{op}: "))
    assert not any("mosaic" in kernel for kernel in kernels_of(case))
    monkeypatch.setattr(dispatch, "MOSAIC_IS_FASTER", frozenset([op]))
    assert kernels_of(case) == {f"duo_{op}_mosaic"}
    assert not any("mosaic" in x for x in kernels_of(dataclasses.replace(case, head_dim=256)))
    if op != "decode":
        found = kernels_of(names[f"{op}: gradient, three tokens"])
        assert f"duo_{op}_dq" in found
        assert not any("mosaic" in kernel for kernel in found)


@needs_mosaic
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in CASES])
def test_every_case_is_traced_by_name_for_a_hopper(name):
    """Under the type checker, which the other process does without."""
    case = CASES[name]
    with described(H200):
        run = functools.partial(case.run, implementation="mosaic")
        assert "_mosaic" in str(jax.make_jaxpr(run)(*case.shapes()))


@needs_mosaic
def test_tiles_of_no_warpgroup_are_a_mistake():
    case = PrefillCase(starts=(0,), length=8, slots=8, **HEADS)
    run = functools.partial(case.run, implementation="mosaic", tiles=two_stages(32))
    with described(H200), pytest.raises(ValueError, match="have not 64 or, unpacked, 128 queries"):
        jax.eval_shape(run, *case.shapes())

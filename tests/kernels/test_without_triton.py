"""A later jax will drop Pallas' Triton lowering: everything but the kernels works without it."""

import pathlib
import subprocess
import sys
import tomllib

import jax

from kernels import compat

ROOT = pathlib.Path(__file__).parents[2]

WITHOUT_TRITON = """
import sys

sys.modules["jax.experimental.pallas.triton"] = None  # importing it raises ImportError

import jax
import jax.numpy as jnp

import duo_jax
import duo_jax.session.runtime
from kernels import decode_attention, dispatch

q, kv, lengths = jnp.ones((1, 4, 16)), jnp.ones((1, 2, 8, 16)), jnp.array([5])
out, lse = decode_attention(q, kv, kv, lengths, softmax_scale=0.25)
assert jnp.allclose(out, 1.0) and out.shape == q.shape
a100 = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=108, platform="gpu")
with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=a100)):
    attend = lambda *x: decode_attention(*x, softmax_scale=0.25)
    jaxpr = str(jax.make_jaxpr(attend)(q, kv, kv, lengths))
    assert "pallas_call" not in jaxpr
for name in ("triton", "interpret"):
    for call in (
        lambda: dispatch.check(name),
        lambda: decode_attention(q, kv, kv, lengths, softmax_scale=0.25, implementation=name),
    ):
        try:
            call()
        except NotImplementedError as error:
            print(error)
"""


def test_jax_without_triton_serves_auto_and_refuses_kernels_with_the_reason():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    refusals = done.stdout.splitlines()
    assert len(refusals) == 4
    for line, name in zip(refusals, ["triton", "triton", "interpret", "interpret"], strict=True):
        assert line.startswith(f"implementation='{name}' needs Pallas' Triton lowering")
        assert f"jax {jax.__version__} does not have" in line
        assert f"pip install '{compat.TESTED}'" in line


def test_the_versions_that_the_message_names_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert compat.TESTED in project["dependencies"]

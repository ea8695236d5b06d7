"""The evidence of the compilers: its parsers, and that docs/kernels.md is current."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import compiled
from benchmarks.compile import ptx, report, roofline, worker
from kernels.all_cases import CASES
from kernels.gpu import Gpu

ROOT = pathlib.Path(__file__).parents[2]

PTX = """\
.version 8.8
.target sm_80
.extern .shared .align 16 .b8 global_smem[];

.visible .entry duo_decode(
	.param .u64 .ptr .align 16 duo_decode_param_0
)
{
	ld.param.b64 	%rd1, [duo_decode_param_0];
	mov.u32 %r36, 0x0; ld.global.b32 { %r36 }, [ %rd66 + 0 ];
	mov.u32 %r40, %r1; @%p1 ld.global.v4.b32 { %r37, %r38, %r39, %r40 }, [ %rd67 + 0 ];
	ld.global.nc.v2.b16 	{%rs1, %rs2}, [%rd9];
	cp.async.cg.shared.global [ %r69 + 0 ], [ %rd75 + 0 ], 0x10, %r70;
	cp.async.cg.shared.global [ %r71 + 0 ], [ %rd76 + 0 ], 0x10, %r70;
	@%p13 cp.async.ca.shared.global [ %r73 + 0 ], [ %rd78 + 0 ], 0x4, 0x4;
	cp.async.commit_group;
	st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;
	wgmma.wait_group.sync.aligned 0;
}
"""

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'duo_prefill' for 'sm_80'
ptxas info    : Function properties for duo_prefill
    40 bytes stack frame, 36 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size, {smem}400 bytes cmem[0]
ptxas info    : Compile time = 404.689 ms
"""  # noqa: E501

THUNKS = """\
000: kCommandBuffer [source | sink]
    001: kCustomKernel [source       | next=002 (1)] duo_prefill grid: [250, 32, 1] threads: [256, 1, 1]  shared_memory: 98304 bytes
    002: kCustomKernel [prev=001 (1) | sink        ] wrapped_transpose grid: [1000, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
"""  # noqa: E501


def test_matrix_instructions_by_shape_and_input_type():
    assert ptx.matrix_instructions(PTX) == {
        "mma m16n8k16 bf16": 2,
        "mma m16n8k8 tf32": 1,
        "wgmma m64n64k16 f16": 1,
    }
    assert ptx.matrix_instructions("fma.rn.f32 %f1, %f2, %f3, %f4;") == {}


def test_loads_by_bytes_leave_out_stores_and_parameters():
    assert ptx.global_loads(PTX) == {16: 3, 4: 3}


def test_entry_is_the_kernels_name():
    assert ptx.entry(PTX) == "duo_decode"
    assert ptx.entry("") is None


def test_ptxas_tells_registers_spills_and_static_shared_memory():
    told = {"registers": 255, "spill_stores": 36, "spill_loads": 32, "static_shared": 0}
    assert ptx.parse_ptxas(PTXAS.format(smem="")) == told
    told["static_shared"] = 4224
    assert ptx.parse_ptxas(PTXAS.format(smem="4224 bytes smem, ")) == told
    with pytest.raises(ValueError, match="nothing of registers"):
        ptx.parse_ptxas("ptxas fatal   : Ptx assembly aborted due to errors")


def test_launches_of_all_kernels():
    launches = ptx.launches(THUNKS)
    assert set(launches) == {"duo_prefill", "wrapped_transpose"}
    assert launches["duo_prefill"] == ptx.Launch(
        grid=(250, 32, 1), threads=256, dynamic_shared=98_304
    )


def test_floor_is_the_longer_of_the_two():
    gpu = Gpu(kind="any", num_cores=1, flops=100.0, bandwidth=10.0)
    assert roofline.floor(gpu, 300.0, 10.0) == {"seconds": 3.0, "bound": "compute"}
    assert roofline.floor(gpu, 300.0, 40.0) == {"seconds": 4.0, "bound": "memory"}


def abort_at_float32(_: str, case: str, *__: str) -> dict:
    if case == "float32":
        print("F0000 no such layout", file=sys.stderr, flush=True)
        os.abort()
    return {"error": None, "kernels": []}


@pytest.mark.slow
def test_a_case_that_ends_the_process_has_a_row(monkeypatch):
    """A compiler that aborts at "float32", as XLA may, loses that case only."""
    monkeypatch.setattr(worker, "compile_case", abort_at_float32)
    jobs = [("decode", name) for name in ("one token", "float32", "head_dim 96", "float16")]
    rows = list(compiled.compile_all(jobs, "a100"))
    assert [(row["op"], row["case"]) for row in rows] == jobs
    assert [row["error"] is None for row in rows] == [True, False, True, True]
    assert rows[1]["error"].startswith("the process ended with code -6: ")
    assert rows[1]["error"].endswith("F0000 no such layout")
    assert "\n" not in rows[1]["error"]
    assert "**float32: does not compile**" in report._kernel_table(rows)


@pytest.mark.slow
@pytest.mark.usefixtures("gpu_compiler")
def test_one_case_is_compiled_and_described():
    (row,) = compiled.compile_all([("streaming", "gradient, odd length")], "h200")
    assert row["error"] is None
    assert [kernel["name"] for kernel in row["kernels"]] == [
        "duo_streaming",
        "duo_streaming_dkv",
        "duo_streaming_dq",
        "duo_streaming_dsink",
    ]
    for kernel in row["kernels"]:
        assert kernel["spill_stores"] == 0
        assert kernel["threads"] == 32 * kernel["block_sizes"]["num_warps"]
        assert kernel["dynamic_shared"] > 0
        assert "16" in kernel["global_loads"]
        assert kernel["matrix_instructions"]


@pytest.fixture(scope="module")
def committed():
    return json.loads((ROOT / compiled.RESULT).read_text(encoding="utf-8"))


COMMANDS = {
    "benchmarks.compiled": [
        "--ops", "merge", "--targets", "a100", "--result", "row.json", "--document", "kernels.md",
    ],
    "benchmarks.budgets": ["--program", "Llama-2-7B, 25%: decode at 200,000", "--layers", "0", "1"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.parametrize("module", ["benchmarks.compiled", "benchmarks.budgets"])
def test_commands_need_no_environment_variable(module, tmp_path):
    """That jax stays on the CPU is theirs to say: a newcomer does not."""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", module, *COMMANDS[module]],
        cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_document_is_what_the_generator_makes(committed):
    document = (ROOT / compiled.DOCUMENT).read_text(encoding="utf-8")
    assert document == report.to_markdown(committed)


def test_results_cover_exactly_the_cases(committed):
    covered = [(row["target"], row["op"], row["case"]) for row in committed["rows"]]
    assert covered == [
        (target, op, case) for target in ("a100", "h200") for op in CASES for case in CASES[op]
    ]


def test_results_are_of_the_current_tile_sizes(committed):
    for row in committed["rows"]:
        case = CASES[row["op"]][row["case"]]
        sizes = case.tiles(gpu=worker.GPUS[row["target"]])
        for kernel in row["kernels"]:
            assert kernel["block_sizes"] == worker.block_sizes(sizes, kernel["name"]), row
        assert row["real_size"] == case.compile_only


def test_roofline_is_current(committed):
    assert committed["roofline"] == roofline.rows(tuple(CASES))

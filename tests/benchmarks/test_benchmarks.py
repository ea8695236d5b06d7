"""The benchmark counts operations as it says, and runs to the end."""

import json

import jax
import pytest

from benchmarks import identify
from kernels import masks


def test_operations_are_those_of_the_visible_pairs():
    flags = identify.IdentifyFlags(embed=256, q_heads=2, kv_heads=1)
    model = flags.architecture
    positions = jax.numpy.arange(50)
    count = identify.flops(model, 50, sink=3, recent=8)
    per_pair = 4 * 2 * 128 * model.num_layers  # q.k and p.v, 2 each per channel
    visible = masks.streaming(positions, positions, sink_size=3, recent_size=8)
    assert count["streaming_attention"] == per_pair * int(visible.sum())
    assert count["full_attention"] == per_pair * int(masks.causal(positions, positions).sum())
    weights = 256 * 128 * (2 + 2 + 1 + 1) + 3 * 256 * 896
    assert count["linear"] == 2 * 50 * weights * model.num_layers


@pytest.mark.slow
def test_smallest_run_writes_json_and_picture(tmp_path, capsys):
    flags = identify.IdentifyFlags(
        lengths=(128, 256), embed=64, q_heads=2, kv_heads=1, repeats=1, out=tmp_path / "cost"
    )
    identify.main(flags)
    result = json.loads((tmp_path / "cost.json").read_text())
    assert [row["length"] for row in result["rows"]] == [128, 256]
    assert result["rows"][0]["ratio"] == pytest.approx(
        result["rows"][0]["step_s"] / result["rows"][0]["forward_s"]
    )
    assert (tmp_path / "cost.png").stat().st_size > 1000
    assert "| 256 |" in capsys.readouterr().out

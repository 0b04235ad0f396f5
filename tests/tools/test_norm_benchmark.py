"""The benchmarks of the norm: passes counted exactly, wrong candidates refused, the cost model's arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import norm_benchmark  # noqa: E402
import norm_candidates  # noqa: E402
import sync_cost_model  # noqa: E402


def test_the_kernels_take_eight_passes_and_the_others_what_they_take(tmp_path: Path) -> None:
    output = tmp_path / "passes.json"
    command = [sys.executable, str(TOOLS / "bench_norm.py"), "--count-passes", "--json", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    passes = json.loads(output.read_text())["passes"]
    totals = {name: (seen["forward"], seen["backward"]) for name, seen in passes.items()}
    assert totals["unitization, kernels"] == (3, 5)
    assert totals["kernels with the residual folded in"] == (5, 6)
    assert totals["unitization, plain path"] == (5, 12)
    assert totals["batchnorm"] == (5, 8)
    assert sum(totals["literal"]) > 40


def settings(**changes: object) -> norm_benchmark.Settings:
    base = norm_benchmark.Settings(
        torch.device("cpu"), torch.float32, 2, 3, ["unitization", "batchnorm"], torch.channels_last, ["both"], False,
        ((8, 6, 2),),
    )  # fmt: skip
    return base._replace(**changes)


def test_a_result_has_medians_spread_and_ratios() -> None:
    result = norm_benchmark.run_benchmark(settings(), say=lambda text: None)
    seen = result["ratio_to_batchnorm"]["both"]["unitization"]
    assert 0 < seen["low"] <= seen["median"] <= seen["high"]
    assert result["rows"][0]["errors"]["unitization"] < 1e-4


def test_no_time_is_reported_for_a_wrong_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_benchmark, "worst_error", lambda *_: 0.5)
    with pytest.raises(SystemExit, match="relative error 5.0e-01, no time is reported"):
        norm_benchmark.run_benchmark(settings(), say=lambda text: None)


def test_the_error_of_every_unitization_form_is_small_and_of_a_wrong_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, grad_y = (torch.randn(3, 5, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(2))
    for name in ("unitization", "composite", "literal"):
        assert norm_candidates.worst_error(x, grad_y, name) < 1e-5, name
    right = norm_candidates.make_candidate

    def wrong(*arguments: object) -> norm_candidates.Candidate:
        candidate = right(*arguments)
        return candidate._replace(function=lambda x: candidate.function(x) * 1.01)

    monkeypatch.setattr(norm_candidates, "make_candidate", wrong)
    assert norm_candidates.worst_error(x, grad_y, "unitization") > 5e-3


def test_the_shapes_are_those_of_resnet101() -> None:
    layers = sum(count for _, _, count in norm_candidates.RESNET101_SHAPES)
    elements = sum(channels * side**2 * count for channels, side, count in norm_candidates.RESNET101_SHAPES)
    assert layers == 100 and elements == pytest.approx(14.12e6, rel=1e-3)


def test_cost_of_a_node_group_does_not_grow_with_the_job_and_a_gather_does() -> None:
    rows = sync_cost_model.table([8, 64, 1024], 99, 488, 16.0, sync_cost_model.Fabric())
    assert rows[0]["node_ms"] == rows[2]["node_ms"] == pytest.approx(3.0, abs=0.1)
    assert [round(row["world_ms"]) for row in rows] == [3, 9, 17]
    assert rows[2]["sync_batch_norm_ms"] > 40 * rows[0]["sync_batch_norm_ms"]
    assert sync_cost_model.all_reduce_us(1, 100, 4, sync_cost_model.Fabric()) == 0


def test_the_host_benchmark_compares_function_and_operator(tmp_path: Path) -> None:
    output = tmp_path / "host.json"
    command = [sys.executable, str(TOOLS / "bench_host.py"), "--rounds", "5", "--json", str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert "function:" in done.stdout and "operator: 1.00 x the operator" in done.stdout
    times = {name: seen["median"] for name, seen in json.loads(output.read_text())["ms"].items()}
    assert set(times) == {"batchnorm", "function", "operator"} and times["function"] < times["operator"]


def test_the_host_benchmark_reports_nothing_where_the_two_ways_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_host

    right = bench_host.layers.unitization_eagerly
    monkeypatch.setattr(bench_host.layers, "unitization_eagerly", lambda *inputs: right(*inputs) * (1 + 1e-6))
    x = torch.randn(bench_host.SHAPE).requires_grad_()
    with pytest.raises(SystemExit, match="differ: no time is reported"):
        bench_host.check_equal(x, torch.randn(bench_host.SHAPE))

"""The Triton kernels: values in the interpreter, types in the compiler for sm_90, and on a GPU where one is at hand."""

import ast
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent

# Largest relative errors seen: float32 1.2e-5 (sums with cancellation), tables from 16-bit input likewise; results
# in 16 bit are off by one rounding. At |mean|/std = 100 float32 rounds x itself to 6e-6 of a deviation.
TABLE_LIMIT = 4e-5
RESULT_LIMIT = {"torch.float32": 2e-5, "torch.bfloat16": 2**-7, "torch.float16": 2**-10}
RESULTS = ("total", "y", "grad_x")


def run_script(name: str, folder: Path, **environment: str) -> dict[str, Any]:
    output = folder / f"{name}.json"
    settings = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), **environment}
    command = [sys.executable, str(HERE / f"{name}.py"), str(output)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    return run_script("interpret", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def shapes() -> list[tuple[int, ...]]:
    """The shapes of interpret.py, read without importing it (it imports triton)."""
    tree = ast.parse((HERE / "interpret.py").read_text())
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return ast.literal_eval(values["SHAPES"])


def check(errors: dict[str, float], dtype: str) -> None:
    too_large = {
        name: error
        for name, error in errors.items()
        if not error <= (RESULT_LIMIT[dtype] if name in RESULTS else TABLE_LIMIT)
    }
    assert not too_large


@pytest.mark.parametrize("dtype", RESULT_LIMIT)
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_every_output_and_gradient_equals_float64(interpreted: Any, shape: tuple[int, ...], dtype: str) -> None:
    check(interpreted[f"{shape} {dtype}"], dtype)


@pytest.mark.parametrize("dtype", RESULT_LIMIT)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_relu_and_residual_in_every_combination(interpreted: Any, relu: bool, residual: bool, dtype: str) -> None:
    check(interpreted[f"options {relu} {residual} {dtype}"], dtype)


@pytest.mark.parametrize("batch", [True, False])
def test_mean_of_a_hundred_deviations(interpreted: Any, batch: bool) -> None:
    check(interpreted[f"far {batch}"], "torch.float32")


def test_running_statistics(interpreted: Any) -> None:
    assert max(interpreted["running"].values()) < 1e-6


def test_layer_and_one_node_on_the_kernels_equal_the_plain_path(interpreted: Any) -> None:
    assert len(interpreted["layer"]) == 8
    assert {name: error for name, error in interpreted["layer"].items() if not error < 2e-5} == {}


def test_a_layer_starts_three_kernels_each_way_and_its_operator_one_more(interpreted: Any) -> None:
    assert interpreted["launches"] == {"eager": [3, 3], "operator": [4, 3]}


def test_every_kernel_compiles_for_sm_90_with_vectorized_loads(tmp_path: Path) -> None:
    found = run_script("compile_for_hopper", tmp_path, TRITON_DEFAULT_FP_FUSION="1")
    assert len(found) == 13
    for name, seen in found.items():
        if "update_running" not in name:
            assert seen["vectorized"] >= 0.4 * seen["loads"], (name, seen)
        # float64 is for the packed sums alone: a stray one would make a pass slow
        wants_fp64 = any(
            word in name for word in ("merge_moments", "FROM_PACKED': True", "BATCH_STATISTICS': True", "update")
        )
        assert seen["fp64"] == wants_fp64, name


def test_a_gradient_in_the_other_memory_format_is_copied_and_said_once_an_expanded_one_is_not_said() -> None:
    from unitdist.kernels import triton_nhwc

    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    triton_nhwc._say_copied.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for given in (torch.randn_like(x), torch.randn(2, 3, 1, 1).expand(2, 3, 4, 5), torch.randn(2, 3, 4, 5).half()):
            have = triton_nhwc._like(given, x)
            assert have.is_contiguous(memory_format=torch.channels_last) and have.dtype == x.dtype
            assert torch.equal(have, given.to(x.dtype))
        assert len(seen) == 1 and "is contiguous and is copied at every step" in str(seen[0].message)
        triton_nhwc._like(torch.randn(2, 3, 4, 5), x)
    assert len(seen) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
def test_on_the_gpu_the_layer_equals_float64(dtype: torch.dtype, residual: bool) -> None:
    import copy

    from unitdist import Unitization2d

    torch.manual_seed(0)
    layer = Unitization2d(96, activation="relu", device="cuda")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    reference = copy.deepcopy(layer).cpu().double()
    x = torch.randn(16, 96, 28, 28, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    addend, grad_y = torch.randn_like(x), torch.randn_like(x)
    have = x.clone().requires_grad_()
    y = layer(have, residual=addend)[0] if residual else layer(have)
    want = (x + addend if residual else x).cpu().double().requires_grad_()
    want_y = reference(want)
    y.backward(grad_y)
    want_y.backward(grad_y.cpu().double() * ((y.cpu() > 0) | (want_y <= 0)))
    limit = RESULT_LIMIT[str(dtype)]
    assert ((y.cpu().double() - want_y).abs().max() / want_y.abs().max()).item() < limit
    assert ((have.grad.cpu().double() - want.grad).abs().max() / want.grad.abs().max()).item() < 2 * limit
    for name in ("weight", "bias", "alpha"):
        got, wanted = getattr(layer, name).grad.cpu().double(), getattr(reference, name).grad
        assert ((got - wanted).abs().max() / wanted.abs().max()).item() < max(limit, TABLE_LIMIT), name
    torch.testing.assert_close(layer.running_var.cpu().double(), reference.running_var, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_on_the_gpu_running_statistics_follow_every_batch(
    momentum: float | None, operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the normalizing launch or in one of their own; many warps read the counter that one thread advances."""
    from unitdist import Unitization2d
    from unitdist.layers import unitization

    monkeypatch.setattr(unitization, "runs_eagerly", lambda x: not operator)
    layer = Unitization2d(2048, momentum=momentum, device="cuda", norm_divisor=4)
    reference = torch.nn.BatchNorm2d(2048, momentum=momentum).double()
    for seed in range(40):
        torch.manual_seed(seed)
        x = torch.randn(4, 2048, 2, 2) + seed
        layer(x.cuda().contiguous(memory_format=torch.channels_last))
        reference(x.double())
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name).cpu().double(), getattr(reference, name), rtol=1e-5, atol=1e-5)
    assert layer.num_batches_tracked.item() == 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_a_training_step_can_be_captured_in_a_graph() -> None:
    from unitdist import Unitization2d

    layer = Unitization2d(64, activation="relu", device="cuda", norm_divisor=196)
    x = torch.randn(8, 64, 14, 14, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()

    def step() -> torch.Tensor:
        y = layer(x)
        (grad,) = torch.autograd.grad(y.square().sum(), [x])
        return grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_offsets_above_2_to_the_31_are_right() -> None:
    from unitdist import Unitization2d

    layer = Unitization2d(64, activation="relu", device="cuda", norm_divisor=1000).eval()
    torch.nn.init.constant_(layer.alpha, 0.5)
    x = torch.empty(16, 1536, 1536, 64, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31 and x.is_contiguous(memory_format=torch.channels_last)
    x.normal_()
    with torch.no_grad():
        assert torch.equal(layer(x)[-1:], layer(x[-1:].clone(memory_format=torch.channels_last)))

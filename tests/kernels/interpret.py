"""Runs the Triton kernels in Triton's interpreter on the CPU and writes their errors; started by test_triton_nhwc.py.

A process of its own: TRITON_INTERPRET must be set before triton is imported by anybody. Reference: `plain` in float64,
which test_unitization.py (functional) compares with the literal algorithms. Every tensor that a kernel is to fill is
made full of NaN beforehand, so that a place left out is seen.
"""

import copy
import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from unitdist import Unitization2d
from unitdist.kernels import passes, plain, triton_nhwc
from unitdist.kernels.parameters import Parameters, Running, Saved
from unitdist.layers import normalize_and_convolve
from unitdist.layers import unitization as layers

SHAPES = [
    (1, 1, 1, 1), (1, 1, 5, 3), (2, 1, 3, 3), (1, 7, 1, 9), (3, 5, 4, 7), (2, 64, 7, 7), (5, 65, 3, 3), (2, 130, 3, 3),
    (1, 257, 2, 2), (4, 3, 33, 17), (33, 4, 2, 3), (34, 33, 1, 1), (2, 16, 56, 5), (1, 2, 70, 61), (3, 63, 13, 1),
    (7, 96, 5, 5), (2, 2100, 2, 1), (70, 3), (9, 70), (1, 65),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def nan_filled() -> Iterator[None]:
    """New tensors of torch.empty_like and Tensor.new_empty hold NaN, not whatever lay there."""
    originals = torch.empty_like, Tensor.new_empty

    def filled(make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    torch.empty_like, Tensor.new_empty = filled(originals[0]), filled(originals[1])
    try:
        yield
    finally:
        torch.empty_like, Tensor.new_empty = originals


def relative_error(have: Tensor, want: Tensor) -> float:
    """max |have - want| / max |want|; NaN counts as infinite."""
    error = (have.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-20)
    return float("inf") if bool(torch.isnan(error)) else error.item()


def case(
    shape: tuple[int, ...], dtype: torch.dtype, relu: bool, residual: bool, batch: bool, mean: float
) -> dict[str, float]:
    """Relative error of every output of the four passes against float64 of the same rounded input."""
    generator = torch.Generator().manual_seed(hash((shape, relu, residual)) % 2**31)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def like_image(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    x, addend, grad_y, skip = (like_image(random(*shape) + offset) for offset in (mean, 0, 0, 0))
    weight, bias, alpha = random(shape[1]), random(shape[1]), random(shape[1])
    given = random(shape[1]) + mean, random(shape[1]).square() + 0.1
    narrow = Parameters(weight, bias, alpha, torch.tensor(6), 1e-5, relu)
    wide = Parameters(weight.double(), bias.double(), alpha.double(), torch.tensor(6), 1e-5, relu)
    extra = addend if residual else None

    with nan_filled():
        total, mean_nc, centred_nc, packed = triton_nhwc.moments(x, extra)
        statistics = packed if batch else given
        y, mean_c, var_c, inverse = triton_nhwc.normalize(total, mean_nc, centred_nc, statistics, narrow)
        saved = Saved(mean_nc, centred_nc, mean_c, var_c, packed, inverse)
        tables, carry = triton_nhwc.gradients(grad_y, total, saved, narrow)
        sums = tables.sums_2c if batch else None
        skip_gradient = skip if residual else None
        grad_x = triton_nhwc.input_gradient(carry, total, saved, narrow, tables.norm_n, sums, skip_gradient)

    # From here in float64, from the sum as it was rounded and with the mask as it fell: both are exact inputs.
    wide_x = total.double()
    _, want_mean, want_centred, want_packed = plain.moments(wide_x, None)
    want_statistics = want_packed if batch else (given[0].double(), given[1].double())
    want_y, want_mean_c, want_var_c, want_inverse = plain.normalize(
        wide_x, want_mean, want_centred, want_statistics, wide
    )
    want_saved = Saved(want_mean, want_centred, want_mean_c, want_var_c, want_packed, want_inverse)
    masked = grad_y.double() * (y > 0) if relu else grad_y.double()
    unmasked = wide._replace(relu=False)
    want_tables, want_carry = plain.gradients(masked, wide_x, want_saved, unmasked)
    want_sums = want_tables.sums_2c if batch else None
    want_grad_x = plain.input_gradient(
        want_carry, wide_x, want_saved, unmasked, want_tables.norm_n, want_sums,
        skip.double() if residual else None,
    )  # fmt: skip
    pairs = {
        "total": (total, (x.double() + addend.double()) if residual else x),
        "mean_nc": (mean_nc, want_mean),
        "centred_nc": (centred_nc, want_centred),
        "packed": (packed, want_packed),
        "mean_c": (mean_c, want_mean_c),
        "var_c": (var_c, want_var_c),
        "y": (y, want_y),
        "inverse_norm": (inverse, want_inverse),
        "grad_weight": (tables.weight_c, want_tables.weight_c),
        "grad_bias": (tables.bias_c, want_tables.bias_c),
        "grad_alpha": (tables.alpha_c, want_tables.alpha_c),
        "norm": (tables.norm_n, want_tables.norm_n.flatten()),
        "sums": (tables.sums_2c, want_tables.sums_2c),
        "grad_x": (grad_x, want_grad_x),
    }
    return {name: relative_error(*pair) for name, pair in pairs.items()}


def running_statistics() -> dict[str, float]:
    """Running statistics moved by their own kernel and within the normalizing one against plain tensor operations."""
    errors = {}
    x = torch.randn(2, 2100)  # more channels than a program holds at a time
    values = [torch.ones(2100) for _ in range(3)]
    parameters = Parameters(values[0], values[1], values[2], torch.tensor(9), 1e-5, False)
    _, mean_nc, centred_nc, sums = triton_nhwc.moments(x, None)
    for momentum in (0.1, None):
        for count in (2.0, 1.0, 0.0):
            packed = sums * (count / 2)
            start = torch.randn(2100), torch.rand(2100), torch.tensor(4)
            alone, fused, want = (Running(*(t.clone() for t in start), momentum) for _ in range(3))
            _, mean, var, _ = triton_nhwc.normalize(x, mean_nc, centred_nc, packed, parameters, fused)
            triton_nhwc.update_running_statistics(mean, var, packed, alone)
            passes.update_running_statistics(mean, var, packed, want)
            for name, have in (("alone", alone), ("fused", fused)):
                pairs = zip(have[:3], want[:3], strict=True)
                errors[f"{name} {momentum} {count}"] = max(relative_error(a, b) for a, b in pairs)
    return errors


def layer_errors() -> dict[str, float]:
    """The whole layer, operator and autograd included, on the kernels against itself on the plain path."""
    originals, errors = (passes._takes_triton, passes._triton_can_move), {}
    for residual in (False, True):
        for training in (True, False):
            torch.manual_seed(0)
            plain_layer = Unitization2d(20, activation="relu", norm_divisor=30).train(training)
            for parameter in plain_layer.parameters():
                torch.nn.init.normal_(parameter)
            conv = torch.nn.Conv2d(20, 4, 1)
            x, addend = (torch.randn(3, 20, 5, 6).contiguous(memory_format=torch.channels_last) for _ in range(2))
            results = []
            kernels = (lambda x, compiled: triton_nhwc.takes(x), lambda running: True)
            for doors in (kernels, originals):
                passes._takes_triton, passes._triton_can_move = doors
                for one_node in (False, True):
                    layer = copy.deepcopy(plain_layer)
                    leaves = [x.clone().requires_grad_(), *layer.parameters(), addend.clone().requires_grad_()]
                    extra = [leaves[-1]] if residual else []
                    if one_node:
                        out = normalize_and_convolve(layer, conv, leaves[0], *extra)
                    else:
                        out = layer(leaves[0], *extra)
                        out = (conv(out[0]), out[1]) if residual else conv(out)
                    loss = (out[0].square().sum() + out[1].pow(3).sum()) if residual else out.square().sum()
                    grads = torch.autograd.grad(loss, leaves if residual else leaves[:-1])
                    results.append([loss.detach(), *grads, *layer.buffers()])
            want = results[2]
            for name, have in (("layer", results[0]), ("one node", results[1])):
                worst = max(relative_error(a, b) for a, b in zip(have, want, strict=True))
                errors[f"{name} residual={residual} training={training}"] = worst
    passes._takes_triton, passes._triton_can_move = originals
    return errors


def launches() -> dict[str, list[int]]:
    """Kernels that one training layer starts, [forward, backward]: called eagerly, and through its operator."""
    counted: list[str] = []
    start = GridExecutor.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(self.fn.__name__)
        return start(self, *args, **kwargs)

    found = {}
    x = torch.randn(3, 20, 5, 6).contiguous(memory_format=torch.channels_last)
    doors = {
        passes: {"_takes_triton": lambda x, compiled: triton_nhwc.takes(x), "_triton_can_move": lambda running: True},
        GridExecutor: {"__call__": count},
    }
    with ExitStack() as stack:
        for place, attributes in doors.items():
            for name, value in attributes.items():
                stack.enter_context(patch.object(place, name, value))
        for way, eagerly in (("eager", True), ("operator", False)):
            layer = Unitization2d(20, activation="relu", norm_divisor=30)
            with patch.object(layers, "runs_eagerly", lambda x, eagerly=eagerly: eagerly):
                y = layer(x.clone().requires_grad_())
            forward = len(counted)
            y.sum().backward()
            found[way] = [forward, len(counted) - forward]
            counted.clear()
    return found


def main() -> None:
    results: dict[str, Any] = {"running": running_statistics(), "layer": layer_errors(), "launches": launches()}
    for index, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            values = math.prod(shape) // shape[1]  # of one there is no variance, and no gradient to compare with
            relu, residual, batch = index % 2 == 0, index % 3 == 0, index % 5 != 0 and values > 1
            results[f"{shape} {dtype}"] = case(shape, dtype, relu, residual, batch, mean=1.0)
    for dtype in DTYPES:
        for relu in (True, False):
            for residual in (True, False):
                results[f"options {relu} {residual} {dtype}"] = case((3, 20, 5, 6), dtype, relu, residual, True, 0.5)
    for batch in (True, False):
        results[f"far {batch}"] = case((6, 40, 9, 7), torch.float32, True, False, batch, mean=100.0)
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()

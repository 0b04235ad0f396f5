"""The four tensor passes compiled by Inductor, one specialization per shape.

Asked for by a layer's `compiled` flag; they need what torch.compile needs: a C++ compiler on the CPU, Triton on CUDA. Same
functions as `cpu` and `generic`. The tables between them stay outside: inside, Inductor computes them again for every
element. The ReLU's mask is recomputed from x in both backward passes; compiled batch norm + ReLU stores it and is slow for it.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from unitdist.functional.moments import sample_moments as _moments
from unitdist.kernels.generic import over_space


def takes(x: Tensor) -> bool:
    """Whether these passes can work on x: 4 axes, dense in either memory format, not empty."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 4 and x.numel() > 0 and dense


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred sum of squares per sample and channel."""
    moments: tuple[Tensor, Tensor] = _run(_moments, x)
    return moments


def scale_shift(x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool) -> Tensor:
    """y = scale_nc * (x - mean_c) + bias_c, then ReLU if `relu`."""
    y: Tensor = _run(_scale_shift, x, mean_c, scale_nc, bias_c, relu)
    return y


def gradient_sums(
    grad_y: Tensor, x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Any]:
    """Sums over space of dy and dy * (x - mean_c), dy masked by the ReLU; third, what masks it again in the next pass."""
    grad_y = grad_y.contiguous(memory_format=_format(x))
    grad_sum_nc, grad_dot_nc = _run(_gradient_sums, x, grad_y, mean_c, scale_nc, bias_c, relu)
    return grad_sum_nc, grad_dot_nc, (grad_y, bias_c, relu)


def input_gradient(
    carried: Any, x: Tensor, mean_c: Tensor, scale_nc: Tensor, slope_nc: Tensor, offset_c: Tensor
) -> Tensor:
    """dx = scale_nc * dy + slope_nc * (x - mean_c) + offset_c."""
    grad_y, bias_c, relu = carried
    grad_x: Tensor = _run(_input_gradient, x, grad_y, mean_c, scale_nc, bias_c, slope_nc, offset_c, relu)
    return grad_x


def _format(x: Tensor) -> torch.memory_format:
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def _run(body: Callable[..., Any], x: Tensor, *arguments: Any) -> Any:
    flags = tuple(argument for argument in arguments if isinstance(argument, bool))
    key = (tuple(x.shape), _format(x), x.dtype, x.device, flags)
    with torch.no_grad():
        return _specialize(body, key)(x.detach(), *arguments)


@cache
def _specialize(body: FunctionType, key: tuple[Any, ...]) -> Callable[..., Any]:
    # A code object of its own per shape: dynamo counts recompilations per code object and gives up after eight.
    copy = FunctionType(body.__code__.replace(co_name=f"{body.__name__}_{hash(key) % 2**32}"), body.__globals__)
    return torch.compile(copy, dynamic=False, fullgraph=True)


def _scale_shift(x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool) -> Tensor:
    y = _affine(x, mean_c, scale_nc, bias_c)
    return (y.relu() if relu else y).to(x.dtype)


def _gradient_sums(
    x: Tensor, grad_y: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    grad = _masked(grad_y, x, mean_c, scale_nc, bias_c, relu)
    deviation = x.to(scale_nc.dtype) - over_space(mean_c[None], x)
    return grad.sum((2, 3)), (grad * deviation).sum((2, 3))


def _input_gradient(
    x: Tensor,
    grad_y: Tensor,
    mean_c: Tensor,
    scale_nc: Tensor,
    bias_c: Tensor,
    slope_nc: Tensor,
    offset_c: Tensor,
    relu: bool,
) -> Tensor:
    grad = _masked(grad_y, x, mean_c, scale_nc, bias_c, relu)
    return (_affine(x, mean_c, slope_nc, offset_c) + grad * over_space(scale_nc, x)).to(x.dtype)


def _affine(x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor) -> Tensor:
    deviation = x.to(scale_nc.dtype) - over_space(mean_c[None], x)
    return deviation * over_space(scale_nc, x) + over_space(bias_c[None], x)


def _masked(grad_y: Tensor, x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool) -> Tensor:
    grad = grad_y.to(scale_nc.dtype)
    if not relu:
        return grad
    y = _affine(x, mean_c, scale_nc, bias_c).to(x.dtype)  # rounded as forward rounded it
    return torch.where(y > 0, grad, 0.0)

"""The four passes compiled by Inductor, tables and tensor in one piece each, one specialization per shape.

Asked for by a layer's `compiled` flag; they need what torch.compile needs: a C++ compiler on the CPU, Triton on CUDA.
The ReLU's mask is recomputed from x in both backward pieces: compiled batch norm + ReLU stores it, and is slow for it.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from unitdist.functional.moments import pixels_of, sample_moments
from unitdist.functional.unitization import GradientTables, gradient_tables, input_gradient_tables
from unitdist.kernels import plain
from unitdist.kernels.generic import over_space
from unitdist.kernels.parameters import Parameters, Saved


def takes(x: Tensor) -> bool:
    """Whether these passes can work on x: 4 axes, dense in either memory format, not empty."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 4 and x.numel() > 0 and dense


def moments(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `passes.moments`."""
    if residual is not None:
        total, mean_nc, centred_nc, packed = _run(_moments_of_sum, x, residual.contiguous(memory_format=_format(x)))
        return total, mean_nc, centred_nc, packed
    return (x, *_run(_moments, x))


def normalize(
    x: Tensor, mean_nc: Tensor, centred_nc: Tensor, statistics: plain.Statistics, parameters: Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `passes.normalize`."""
    if isinstance(statistics, Tensor):
        return _run(_normalize_batch, x, mean_nc, centred_nc, statistics, parameters)  # type: ignore[no-any-return]
    y, inverse_norm_n = _run(_normalize, x, mean_nc, centred_nc, *statistics, parameters)
    return y, *statistics, inverse_norm_n


def gradients(grad_y: Tensor, x: Tensor, saved: Saved, parameters: Parameters) -> tuple[GradientTables, Any]:
    """See `passes.gradients`. Carries grad_y in x's memory format."""
    grad_y = grad_y.contiguous(memory_format=_format(x))
    return GradientTables(*_run(_gradients, x, grad_y, saved, parameters)), grad_y


def input_gradient(
    carry: Any,
    x: Tensor,
    saved: Saved,
    parameters: Parameters,
    norm_n: Tensor,
    sums_2c: Tensor | None,
    skip_gradient: Tensor | None,
) -> Tensor:
    """See `passes.input_gradient`."""
    if skip_gradient is not None:
        skip_gradient = skip_gradient.contiguous(memory_format=_format(x))
    grad_x: Tensor = _run(_input_gradient, x, carry, saved, parameters, norm_n, sums_2c, skip_gradient)
    return grad_x


def _format(x: Tensor) -> torch.memory_format:
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def _run(body: Callable[..., Any], x: Tensor, *arguments: Any) -> Any:
    kinds = tuple(argument is None for argument in arguments)
    settings = tuple(argument[4:] for argument in arguments if isinstance(argument, Parameters))
    key = (tuple(x.shape), _format(x), x.dtype, x.device, kinds, settings)
    with torch.no_grad():
        return _specialize(body, key)(x.detach(), *arguments)


@cache
def _specialize(body: FunctionType, key: tuple[Any, ...]) -> Callable[..., Any]:
    # A code object of its own per shape: dynamo counts recompilations per code object and gives up after eight.
    copy = FunctionType(body.__code__.replace(co_name=f"{body.__name__}_{hash(key) % 2**32}"), body.__globals__)
    return torch.compile(copy, dynamic=False, fullgraph=True)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean_nc, centred_nc = sample_moments(x)
    return mean_nc, centred_nc, plain.pack(mean_nc, centred_nc, pixels_of(x))


def _moments_of_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x + residual
    return (total, *_moments(total))


def _normalize_batch(
    x: Tensor, mean_nc: Tensor, centred_nc: Tensor, packed: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean_c, var_c, tables = plain.tables_of(mean_nc, centred_nc, packed, parameters, pixels_of(x))
    y = _affine(x, mean_c, tables.scale_nc, parameters.bias_c)
    y = (y.relu() if parameters.relu else y).to(x.dtype)
    return y, mean_c, var_c, tables.inverse_norm_n.squeeze(1)


def _normalize(
    x: Tensor, mean_nc: Tensor, centred_nc: Tensor, mean_c: Tensor, var_c: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor]:
    tables = plain.tables_of(mean_nc, centred_nc, (mean_c, var_c), parameters, pixels_of(x))[2]
    y = _affine(x, mean_c, tables.scale_nc, parameters.bias_c)
    return (y.relu() if parameters.relu else y).to(x.dtype), tables.inverse_norm_n.squeeze(1)


def _gradients(x: Tensor, grad_y: Tensor, saved: Saved, parameters: Parameters) -> tuple[Tensor, ...]:
    weight_c, _, alpha_c, norm_divisor, _, _ = parameters
    tables = plain.saved_tables(saved, parameters, pixels_of(x))
    grad = _masked(grad_y, x, saved.mean_c, tables.scale_nc, parameters)
    deviation = x.to(grad.dtype) - over_space(saved.mean_c[None], x)
    sums = grad.flatten(2).sum(2), (grad * deviation).flatten(2).sum(2)
    return tuple(
        gradient_tables(*sums, tables, saved.mean_nc, saved.mean_c, weight_c, alpha_c, norm_divisor, pixels_of(x))
    )


def _input_gradient(
    x: Tensor,
    grad_y: Tensor,
    saved: Saved,
    parameters: Parameters,
    norm_n: Tensor,
    sums_2c: Tensor | None,
    skip_gradient: Tensor | None,
) -> Tensor:
    tables = plain.saved_tables(saved, parameters, pixels_of(x))
    count = None if sums_2c is None else saved.packed[-1].clamp(min=1.0).to(sums_2c.dtype)
    slope_nc, offset_c = input_gradient_tables(tables, norm_n, sums_2c, count, saved.mean_c)
    grad = _masked(grad_y, x, saved.mean_c, tables.scale_nc, parameters)
    grad_x = _affine(x, saved.mean_c, slope_nc, offset_c) + grad * over_space(tables.scale_nc, x)
    return (grad_x if skip_gradient is None else grad_x + skip_gradient).to(x.dtype)


def _affine(x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor) -> Tensor:
    deviation = x.to(scale_nc.dtype) - over_space(mean_c[None], x)
    return deviation * over_space(scale_nc, x) + over_space(bias_c[None], x)


def _masked(grad_y: Tensor, x: Tensor, mean_c: Tensor, scale_nc: Tensor, parameters: Parameters) -> Tensor:
    grad = grad_y.to(scale_nc.dtype)
    if not parameters.relu:
        return grad
    y = _affine(x, mean_c, scale_nc, parameters.bias_c).to(x.dtype)  # rounded as forward rounded it
    return torch.where(y > 0, grad, 0.0)

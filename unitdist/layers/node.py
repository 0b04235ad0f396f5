"""Unitization as one autograd node: an operator whose backward is written by hand (SPEC section 3).

`torch.ops.unitdist.unitization` is opaque to autograd, to torch.compile and to torch.export; inside it runs
moments pass -> merge over the group -> tables -> scale-shift pass, and backward
sums pass -> tables -> sum over the group -> gradient pass. It keeps x and (N, C) tables, nothing else of
x's size. The collectives stand inside the operator, so that a compiled graph cannot split or reorder them.
"""

from typing import Any

import torch
from torch import Tensor

from unitdist.functional.moments import accumulation_dtype, channel_moments, pixels_of
from unitdist.functional.unitization import (
    SampleTables,
    gradient_tables,
    input_gradient_tables,
    sample_tables,
)
from unitdist.kernels import passes
from unitdist.layers import pixel_scope
from unitdist.sync import NO_GROUP, active_group_name, merge_moments, sum_over_group


@torch.library.custom_op("unitdist::unitization", mutates_args=())
def unitization(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm_divisor: Tensor,
    eps: float,
    relu: bool,
    pixel_norm: bool,
    batch_statistics: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Alg. 2 (Fig. 1c; `pixel_norm`: Fig. 1b), with an optional ReLU on the output.

    x: (N, C, *spatial). weight, bias, alpha: (C,). norm_divisor: 0-d int64 on x's device.
    `batch_statistics`: mean and variance of the batch over the ranks of `group_name` (training); otherwise
    running_mean and running_var, as constants (evaluation). Returns y (x's type and format), the mean and
    biased variance used (C,), the number of values behind them (0-d float64), and for backward the mean and
    centred sum of squares per sample and channel (N, C). Only y carries a gradient.
    """
    dtype = accumulation_dtype(x.dtype)
    mean_nc, centred_nc = passes.sample_moments(x)
    if batch_statistics:
        pixels = pixels_of(x)
        local_mean_c, local_centred_c = channel_moments(mean_nc, centred_nc, pixels)
        group = active_group_name(group_name)
        mean_c, var_c, count = merge_moments(local_mean_c, local_centred_c, x.shape[0] * pixels, group)
    else:
        mean_c, var_c = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
        count = torch.zeros((), dtype=torch.float64, device=x.device)
    weight_c, bias_c, alpha_c = weight.to(dtype), bias.to(dtype), alpha.to(dtype)
    if pixel_norm:
        y = pixel_scope.forward(x, mean_c, var_c, weight_c, bias_c, alpha_c, norm_divisor, eps, relu)
    else:
        tables = sample_tables(
            mean_nc, centred_nc, mean_c, var_c, weight_c, alpha_c, norm_divisor, pixels_of(x), eps
        )
        y = passes.scale_shift(x, mean_c, tables.scale_nc, bias_c, relu)
    return y, mean_c, var_c, count, mean_nc, centred_nc


@unitization.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm_divisor: Tensor,
    eps: float,
    relu: bool,
    pixel_norm: bool,
    batch_statistics: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    channels = x.shape[1]
    return (
        torch.empty_like(x),
        x.new_empty(channels, dtype=dtype),
        x.new_empty(channels, dtype=dtype),
        x.new_empty((), dtype=torch.float64),
        x.new_empty(x.shape[:2], dtype=dtype),
        x.new_empty(x.shape[:2], dtype=dtype),
    )


@torch.library.custom_op("unitdist::unitization_backward", mutates_args=())
def unitization_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    norm_divisor: Tensor,
    mean_c: Tensor,
    var_c: Tensor,
    count: Tensor,
    mean_nc: Tensor,
    centred_nc: Tensor,
    eps: float,
    relu: bool,
    pixel_norm: bool,
    batch_statistics: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `unitization` with respect to x, weight, bias and alpha; the last three of this rank alone.

    The gradient of x goes through mean and variance, hence through the samples of all ranks: with
    `batch_statistics` 2C numbers are summed over `group_name`.
    """
    dtype = mean_c.dtype
    weight_c, bias_c, alpha_c = weight.to(dtype), bias.to(dtype), alpha.to(dtype)
    group = active_group_name(group_name) if batch_statistics else NO_GROUP
    if pixel_norm:
        grad_x, grad_weight, grad_bias, grad_alpha = pixel_scope.backward(
            grad_y, x, mean_c, var_c, count, weight_c, bias_c, alpha_c, norm_divisor, eps, relu, batch_statistics, group
        )
    else:
        tables = sample_tables(
            mean_nc, centred_nc, mean_c, var_c, weight_c, alpha_c, norm_divisor, pixels_of(x), eps
        )
        grad_sum_nc, grad_dot_nc, grad_y = passes.gradient_sums(grad_y, x, mean_c, tables.scale_nc, bias_c, relu)
        gradients = gradient_tables(
            grad_sum_nc, grad_dot_nc, tables, mean_nc, mean_c, weight_c, alpha_c, norm_divisor, pixels_of(x)
        )
        sums_2c = sum_over_group(gradients.sums_2c, group) if batch_statistics else None
        grad_x = _input_gradient(grad_y, x, tables, gradients.norm_n, sums_2c, count, mean_c)
        grad_weight, grad_bias, grad_alpha = gradients.weight_c, gradients.bias_c, gradients.alpha_c
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_alpha.to(alpha.dtype)


def _input_gradient(
    grad_y: Tensor,
    x: Tensor,
    tables: SampleTables,
    norm_n: Tensor,
    sums_2c: Tensor | None,
    count: Tensor,
    mean_c: Tensor,
) -> Tensor:
    divisor = count.clamp(min=1.0).to(mean_c.dtype)
    slope_nc, offset_c = input_gradient_tables(tables, norm_n, sums_2c, divisor, mean_c)
    return passes.input_gradient(grad_y, x, mean_c, tables.scale_nc, slope_nc, offset_c)


@unitization_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    norm_divisor: Tensor,
    mean_c: Tensor,
    var_c: Tensor,
    count: Tensor,
    mean_nc: Tensor,
    centred_nc: Tensor,
    eps: float,
    relu: bool,
    pixel_norm: bool,
    batch_statistics: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(alpha)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, alpha, _, _, norm_divisor, eps, relu, pixel_norm, batch_statistics, group_name = inputs
    _, mean_c, var_c, count, mean_nc, centred_nc = output
    ctx.mark_non_differentiable(mean_c, var_c, count, mean_nc, centred_nc)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, alpha, norm_divisor, mean_c, var_c, count, mean_nc, centred_nc)
    ctx.settings = (eps, relu, pixel_norm, batch_statistics, group_name)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 12
    gradients = unitization_backward(grad_y, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, *(None,) * 8)


unitization.register_autograd(_backward, setup_context=_setup_context)

"""Unitization as one autograd node, whose backward is written by hand (unitdist/functional/README.md).

Forward runs moments -> sum over the group -> normalize, backward gradients -> sum over the group -> input gradient. It
keeps x and (N, C) tables, nothing else of x's size. There are two doors to the same functions:

- `torch.ops.unitdist.unitization`, an operator that torch.compile, torch.export and every mode that watches operators
  takes as a whole. The collectives stand inside it, so that a compiled graph can neither break at them nor reorder
  them between ranks.
- `unitization_eagerly`, a plain autograd function. torch.library's operators written in Python cost the host twice as much
  per call (DECISIONS.md, 2026-11-29), which a hundred small layers on a fast GPU would wait for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unitdist.functional.moments import accumulation_dtype
from unitdist.kernels import passes
from unitdist.kernels.parameters import Parameters, Running, Saved
from unitdist.layers import pixel_scope
from unitdist.sync import NO_GROUP, active_group_name, sum_over_group

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("unitdist::unitization", mutates_args=())
def unitization(
    x: Tensor,
    residual: Tensor | None,
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
    compiled: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Alg. 2 (Fig. 1c; `pixel_norm`: Fig. 1b) of x + residual, with an optional ReLU on the output.

    x, residual: (N, C, *spatial). weight, bias, alpha: (C,). norm_divisor: 0-d int64 on x's device.
    `batch_statistics`: mean and variance of the batch over the ranks of `group_name` (training); otherwise
    running_mean and running_var, as constants (evaluation). `compiled`: by Inductor's pieces.
    Returns y and x + residual (x's type and format; empty without a residual), which carry gradients, and the
    fields of `Saved`, which do not.
    """
    return _forward(
        None, x, residual, weight, bias, alpha, running_mean, running_var, norm_divisor, eps, relu, pixel_norm,
        batch_statistics, compiled, group_name,
    )  # fmt: skip


def _forward(
    running: Running | None,
    x: Tensor,
    residual: Tensor | None,
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
    compiled: bool,
    group_name: str,
) -> Outputs:
    dtype = accumulation_dtype(x.dtype)
    parameters = Parameters(weight.to(dtype), bias.to(dtype), alpha.to(dtype), norm_divisor, eps, relu)
    if batch_statistics and not pixel_norm:
        y, total, saved = normalize_batch(x, residual, parameters, compiled, group_name, running)
        return y, x.new_empty(0) if residual is None else total, *saved
    total, mean_nc, centred_nc, packed = passes.moments(x, residual, compiled)
    statistics: Tensor | tuple[Tensor, Tensor] = packed
    if batch_statistics:
        sum_over_group(packed, active_group_name(group_name))
    else:
        statistics = (running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True))
        packed = packed.new_empty(0)
    if pixel_norm:
        y, mean_c, var_c = pixel_scope.normalize(total, statistics, parameters)
        inverse_norm_n = mean_nc.new_empty(0)
        if running is not None:
            passes.update_running_statistics(mean_c, var_c, packed, running)
    else:
        y, mean_c, var_c, inverse_norm_n = passes.normalize(
            total, mean_nc, centred_nc, statistics, parameters, compiled
        )
    total = x.new_empty(0) if residual is None else total
    return y, total, mean_nc, centred_nc, mean_c, var_c, packed, inverse_norm_n


def normalize_batch(
    x: Tensor,
    residual: Tensor | None,
    parameters: Parameters,
    compiled: bool,
    group_name: str,
    running: Running | None = None,
) -> tuple[Tensor, Tensor, Saved]:
    """The forward pass in training, image scope: y, x + residual (x itself without one), and what backward needs."""
    total, mean_nc, centred_nc, packed = passes.moments(x, residual, compiled)
    sum_over_group(packed, active_group_name(group_name))
    y, mean_c, var_c, inverse_norm_n = passes.normalize(
        total, mean_nc, centred_nc, packed, parameters, compiled, running
    )
    return y, total, Saved(mean_nc, centred_nc, mean_c, var_c, packed, inverse_norm_n)


@unitization.register_fake
def _(x: Tensor, residual: Tensor | None, *rest: Any) -> Outputs:
    *_, pixel_norm, batch_statistics, _, _ = rest
    samples, channels = x.shape[:2]
    table = x.new_empty((samples, channels), dtype=accumulation_dtype(x.dtype))
    return (
        torch.empty_like(x),
        torch.empty_like(x) if residual is not None else x.new_empty(0),
        table,
        torch.empty_like(table),
        table.new_empty(channels),
        table.new_empty(channels),
        x.new_empty(2 * channels + 1 if batch_statistics else 0, dtype=torch.float64),
        table.new_empty(0 if pixel_norm else samples),
    )


def _gradients(
    grad_y: Tensor,
    skip_gradient: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    norm_divisor: Tensor,
    saved: list[Tensor],
    eps: float,
    relu: bool,
    pixel_norm: bool,
    batch_statistics: bool,
    compiled: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `unitization` with respect to x, weight, bias and alpha; the last three of this rank alone.

    x: what was normalized (the sum, if there was a residual). `skip_gradient`: the gradient of that sum from its other
    use, added to the first result. `saved`: the fields of `Saved`. The gradient of x goes through mean and variance,
    hence through the samples of all ranks: with `batch_statistics` 2C numbers are summed over `group_name`.
    """
    kept = Saved(*saved)
    dtype = kept.mean_c.dtype
    parameters = Parameters(weight.to(dtype), bias.to(dtype), alpha.to(dtype), norm_divisor, eps, relu)
    group = active_group_name(group_name) if batch_statistics else NO_GROUP
    if pixel_norm:
        grad_x, *grads = pixel_scope.gradients(grad_y, x, kept, parameters, batch_statistics, group)
        grad_x = grad_x if skip_gradient is None else grad_x.add_(skip_gradient)
    else:
        tables, carry = passes.gradients(grad_y, x, kept, parameters, compiled)
        sums_2c = sum_over_group(tables.sums_2c, group) if batch_statistics else None
        grad_x = passes.input_gradient(carry, x, kept, parameters, tables.norm_n, sums_2c, skip_gradient, compiled)
        grads = [tables.weight_c, tables.bias_c, tables.alpha_c]
    return grad_x, grads[0].to(weight.dtype), grads[1].to(bias.dtype), grads[2].to(alpha.dtype)


unitization_backward = torch.library.custom_op("unitdist::unitization_backward", _gradients, mutates_args=())


@unitization_backward.register_fake
def _(grad_y: Tensor, skip_gradient: Tensor | None, x: Tensor, *rest: Any) -> Gradients:
    weight, bias, alpha, *_ = rest
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(alpha)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _keep(ctx, inputs, output)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, residual, weight, bias, alpha, _, _, norm_divisor, *settings = inputs
    _, total, *saved = output
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else total, weight, bias, alpha, norm_divisor, *saved)
    ctx.settings = settings


def _backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return _input_gradients(ctx, grad_y, grad_total, unitization_backward)


def _input_gradients(
    ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, gradients: Callable[..., Gradients]
) -> tuple[Tensor | None, ...]:
    x, weight, bias, alpha, norm_divisor, *saved = ctx.saved_tensors
    skip_gradient = grad_total if ctx.has_residual else None
    if grad_y is None:
        return (skip_gradient, skip_gradient, *(None,) * 12)
    grad_x, *grads = gradients(grad_y, skip_gradient, x, weight, bias, alpha, norm_divisor, saved, *ctx.settings)
    return (grad_x, grad_x if ctx.has_residual else None, *grads, *(None,) * 9)


unitization.register_autograd(_backward, setup_context=_setup_context)


class UnitizationFunction(torch.autograd.Function):
    """The operator's forward and backward without the operator; its first argument moves the running statistics."""

    @staticmethod
    def forward(ctx: Any, running: Running | None, *inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        output = _forward(running, *inputs)
        _keep(ctx, inputs, output)
        return output[:2] if ctx.has_residual else output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return (None, *_input_gradients(ctx, grad_y, grad_total, _gradients))


def runs_eagerly(x: Tensor) -> bool:
    """Whether nobody watches operators: no compiler, exporter, tracer, mode or transform, and a plain tensor with data."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def unitization_eagerly(running: Running | None, *inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As `unitization` with its arguments as `inputs`, where `runs_eagerly`; returns y, or (y, x + residual).

    `running`: moved towards the batch's statistics in the same pass.
    """
    out: Tensor | tuple[Tensor, Tensor] = UnitizationFunction.apply(running, *inputs)
    return out

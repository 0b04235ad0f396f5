"""(Unitization, ReLU, convolution) as one autograd node, which hides the backward collective behind a convolution.

Autograd computes both gradients of a convolution before the norm below it starts. As one node the backward pass runs
gradient of the convolution's input -> sums of the norm -> start the all_reduce -> gradient of the convolution's weight
-> wait -> gradient of x: the message travels while the device is busy. Every gradient equals the separate form's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unitdist.functional.moments import accumulation_dtype
from unitdist.kernels import passes
from unitdist.kernels.parameters import Parameters, Running, Saved
from unitdist.layers.node import normalize_batch, runs_eagerly
from unitdist.layers.unitization import Unitization2d
from unitdist.sync import active_group_name, start_sum_over_group

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def normalize_and_convolve(
    norm: Unitization2d, conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None, *, keep_output: bool = True
) -> Tensor | tuple[Tensor, Tensor]:
    """conv(norm(x)) in training as one autograd node; with `residual`, (conv(norm(x + residual)), x + residual).

    x: (N, C, H, W). The modules stay what they are: same parameters, same state, same results. `keep_output=False`: the
    norm's output is not kept for backward but computed again from x, one activation instead of two, for one
    more pass. Where the node does not apply (evaluation, norm per pixel, hooks on either module, a subclass with its own
    forward, autocast to another type than x's) the modules are called one after the other.
    """
    if not _applies(norm, conv, x):
        y = norm(x) if residual is None else norm(x, residual)
        return (conv(y[0]), y[1]) if isinstance(y, tuple) else conv(y)
    norm.prepare(x)
    assert not isinstance(conv.padding, str)
    inputs = (
        x,
        residual,
        norm.weight,
        norm.bias,
        norm.alpha,
        norm.norm_divisor,
        conv.weight.to(x.dtype),
        None if conv.bias is None else conv.bias.to(x.dtype),
        list(conv.stride),
        list(conv.padding),
        list(conv.dilation),
        conv.groups,
        norm.eps,
        norm.activation == "relu",
        norm.compiled,
        keep_output,
        norm.sync_group_name(),
    )
    if runs_eagerly(x):
        result: Tensor | tuple[Tensor, Tensor] = UnitizationConvolutionFunction.apply(
            norm.running_statistics(), *inputs
        )
        return result
    out, total, _, *saved = unitization_convolution(*inputs)
    kept = Saved(*saved)
    norm.update_running_statistics(kept.mean_c, kept.var_c, kept.packed)
    return out if residual is None else (out, total)


def _applies(norm: Unitization2d, conv: nn.Conv2d, x: Tensor) -> bool:
    plain = type(norm) is Unitization2d and type(conv) is nn.Conv2d and norm.norm_scope == "image" and norm.training
    watched = any(
        hooks
        for module in (norm, conv)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )
    if not plain or watched:
        return False  # before autocast is asked, which does not know the meta device of a dry run
    kind = x.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else conv.weight.dtype
    simple = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return simple and computed == x.dtype


@torch.library.custom_op("unitdist::unitization_convolution", mutates_args=())
def unitization_convolution(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    norm_divisor: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
    compiled: bool,
    keep_output: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The convolution of the batch-normalized, unitized and rectified x + residual, with batch statistics.

    Returns the convolution's output, x + residual (empty without a residual), the convolution's input (empty unless
    `keep_output`), and the fields of `Saved`. x and conv_weight have one type.
    """
    return _forward(
        None, x, residual, weight, bias, alpha, norm_divisor, conv_weight, conv_bias, stride, padding, dilation, groups,
        eps, relu, compiled, keep_output, group_name,
    )  # fmt: skip


def _forward(
    running: Running | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    norm_divisor: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
    compiled: bool,
    keep_output: bool,
    group_name: str,
) -> Outputs:
    dtype = accumulation_dtype(x.dtype)
    parameters = Parameters(weight.to(dtype), bias.to(dtype), alpha.to(dtype), norm_divisor, eps, relu)
    y, total, saved = normalize_batch(x, residual, parameters, compiled, group_name, running)
    with torch.autocast(x.device.type, enabled=False):
        out = torch.ops.aten.convolution(y, conv_weight, conv_bias, stride, padding, dilation, False, [0, 0], groups)
    return out, x.new_empty(0) if residual is None else total, y if keep_output else x.new_empty(0), *saved


@unitization_convolution.register_fake
def _(x: Tensor, residual: Tensor | None, *rest: Any) -> Outputs:
    *_, conv_weight, conv_bias, stride, padding, dilation, groups, _, _, _, keep_output, _ = rest
    samples, channels = x.shape[:2]
    out = torch.ops.aten.convolution(
        torch.empty_like(x), conv_weight, conv_bias, stride, padding, dilation, False, [0, 0], groups
    )
    table = x.new_empty((samples, channels), dtype=accumulation_dtype(x.dtype))
    return (
        out,
        x.new_empty(0) if residual is None else torch.empty_like(x),
        torch.empty_like(x) if keep_output else x.new_empty(0),
        table,
        torch.empty_like(table),
        table.new_empty(channels),
        table.new_empty(channels),
        x.new_empty(2 * channels + 1, dtype=torch.float64),
        table.new_empty(samples),
    )


def _gradients(
    grad_out: Tensor,
    skip_gradient: Tensor | None,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    norm_divisor: Tensor,
    conv_weight: Tensor,
    saved: list[Tensor],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
    compiled: bool,
    keep_output: bool,
    group_name: str,
    has_conv_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x (+ skip gradient), weight, bias, alpha, conv_weight and conv_bias (or empty)."""
    kept = Saved(*saved)
    dtype = kept.mean_c.dtype
    parameters = Parameters(weight.to(dtype), bias.to(dtype), alpha.to(dtype), norm_divisor, eps, relu)
    if not keep_output:
        y = passes.normalize(x, kept.mean_nc, kept.centred_nc, (kept.mean_c, kept.var_c), parameters, compiled)[0]
    settings = ([conv_weight.shape[0]], stride, padding, dilation, False, [0, 0], groups)
    convolution_backward = torch.ops.aten.convolution_backward
    grad_y = convolution_backward(grad_out, y, conv_weight, *settings, [True, False, False])[0]
    tables, carry = passes.gradients(grad_y, x, kept, parameters, compiled)
    work = start_sum_over_group(tables.sums_2c, active_group_name(group_name))
    _, grad_conv_weight, grad_conv_bias = convolution_backward(
        grad_out, y, conv_weight, *settings, [False, True, has_conv_bias]
    )
    if work is not None:
        work.wait()
    grad_x = passes.input_gradient(carry, x, kept, parameters, tables.norm_n, tables.sums_2c, skip_gradient, compiled)
    grads = tables.weight_c.to(weight.dtype), tables.bias_c.to(bias.dtype), tables.alpha_c.to(alpha.dtype)
    return grad_x, *grads, grad_conv_weight, grad_conv_bias if has_conv_bias else x.new_empty(0)


unitization_convolution_backward = torch.library.custom_op(
    "unitdist::unitization_convolution_backward", _gradients, mutates_args=()
)


@unitization_convolution_backward.register_fake
def _(grad_out: Tensor, skip_gradient: Tensor | None, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, bias, alpha, _, conv_weight, *_, has_conv_bias = rest
    grads = [torch.empty_like(value) for value in (x, weight, bias, alpha, conv_weight)]
    return (*grads, x.new_empty(conv_weight.shape[0] if has_conv_bias else 0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _keep(ctx, inputs, output)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, residual, weight, bias, alpha, norm_divisor, conv_weight, conv_bias, *settings = inputs
    _, total, y, *saved = output
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.has_conv_bias = conv_bias is not None
    normalized = x if residual is None else total
    ctx.save_for_backward(normalized, y, weight, bias, alpha, norm_divisor, conv_weight, *saved)
    ctx.settings = settings


def _backward(ctx: Any, grad_out: Tensor | None, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return _input_gradients(ctx, grad_out, grad_total, unitization_convolution_backward)


def _input_gradients(
    ctx: Any, grad_out: Tensor | None, grad_total: Tensor | None, gradients: Callable[..., Gradients]
) -> tuple[Tensor | None, ...]:
    x, y, weight, bias, alpha, norm_divisor, conv_weight, *saved = ctx.saved_tensors
    skip_gradient = grad_total if ctx.has_residual else None
    if grad_out is None:
        return (skip_gradient, skip_gradient, *(None,) * 15)
    grad_x, *grads, grad_conv_weight, grad_conv_bias = gradients(
        grad_out, skip_gradient, x, y, weight, bias, alpha, norm_divisor, conv_weight, saved, *ctx.settings,
        ctx.has_conv_bias,
    )  # fmt: skip
    return (
        grad_x,
        grad_x if ctx.has_residual else None,
        *grads,
        None,
        grad_conv_weight,
        grad_conv_bias if ctx.has_conv_bias else None,
        *(None,) * 9,
    )


unitization_convolution.register_autograd(_backward, setup_context=_setup_context)


class UnitizationConvolutionFunction(torch.autograd.Function):
    """The operator's forward and backward without the operator (see `unitdist.layers.node`)."""

    @staticmethod
    def forward(ctx: Any, running: Running, *inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        output = _forward(running, *inputs)
        _keep(ctx, inputs, output)
        return output[:2] if ctx.has_residual else output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return (None, *_input_gradients(ctx, grad_out, grad_total, _gradients))

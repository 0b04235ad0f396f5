"""Fig. 1b: one norm per pixel over the channels. A variant to compare with, in plain tensor operations.

Axes: n samples, c channels, p pixels. The norm of a pixel is no function of (N, C) tables, so this scope
works on tensors of x's size in the statistics' type.
"""

import torch
from torch import Tensor

from unitdist.functional.moments import unpack_moments
from unitdist.kernels.parameters import Parameters, Saved
from unitdist.sync import sum_over_group


def normalize(
    x: Tensor, statistics: Tensor | tuple[Tensor, Tensor], parameters: Parameters
) -> tuple[Tensor, Tensor, Tensor]:
    """y = weight_c [p alpha_c + 1 - alpha_c] xh + bias_c, p = 1/sqrt(sum over c of xh^2 / n + eps) per pixel.

    x: (N, C, *spatial), any type. `statistics`: packed sums of all ranks, or (mean_c, var_c). Returns y in x's type and
    format, mean_c and var_c.
    """
    if isinstance(statistics, Tensor):
        mean_c, var_c, _ = unpack_moments(statistics, parameters.weight_c.dtype)
    else:
        mean_c, var_c = statistics
    normalized, inverse_norm = _normalize(x, mean_c, var_c, parameters)
    alpha = _column(parameters.alpha_c, x)
    mixture = inverse_norm * alpha + 1 - alpha
    y = normalized * mixture * _column(parameters.weight_c, x) + _column(parameters.bias_c, x)
    return (torch.relu_(y) if parameters.relu else y).to(x.dtype), mean_c, var_c


def gradients(
    grad_y: Tensor, x: Tensor, saved: Saved, parameters: Parameters, batch_statistics: bool, group_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, weight, bias, alpha. One sum of 2C numbers over the group.

    With g = dy (masked by the ReLU): ds = -1/2 p^3 sum over c of weight alpha g xh; dxh = weight t g + 2 ds xh / n;
    dx = r (dxh - mean(dxh) - xh mean(dxh xh)), the means over samples, pixels and ranks (0 in evaluation).
    """
    normalized, inverse_norm = _normalize(x, saved.mean_c, saved.var_c, parameters)
    weight, alpha = _column(parameters.weight_c, x), _column(parameters.alpha_c, x)
    mixture = inverse_norm * alpha + 1 - alpha
    grad = grad_y.to(saved.mean_c.dtype)
    if parameters.relu:
        grad = grad * ((normalized * mixture * weight + _column(parameters.bias_c, x)).to(x.dtype) > 0)
    product = normalized * grad
    grad_squared_norm = -0.5 * inverse_norm.pow(3) * (product * weight * alpha).sum(1, keepdim=True)
    grad_normalized = normalized * (2 * grad_squared_norm / parameters.norm_divisor) + mixture * weight * grad
    summed = [0, *range(2, x.dim())]
    grad_weight, grad_bias = (product * mixture).sum(summed), grad.sum(summed)
    grad_alpha = parameters.weight_c * ((inverse_norm - 1) * product).sum(summed)
    grad_x = grad_normalized
    if batch_statistics:
        sums_2c = torch.cat([grad_normalized.sum(summed), (grad_normalized * normalized).sum(summed)])
        count = saved.packed[-1].clamp(min=1.0).to(sums_2c.dtype)
        mean_grad_c, mean_product_c = (sum_over_group(sums_2c, group_name) / count).chunk(2)
        grad_x = grad_normalized - _column(mean_grad_c, x) - normalized * _column(mean_product_c, x)
    grad_x = (grad_x * _column(torch.rsqrt(saved.var_c + parameters.eps), x)).to(x.dtype)
    return grad_x, grad_weight, grad_bias, grad_alpha


def _normalize(x: Tensor, mean_c: Tensor, var_c: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    normalized = (x - _column(mean_c, x)) * _column(torch.rsqrt(var_c + parameters.eps), x)
    squared_norm = normalized.square().sum(1, keepdim=True) / parameters.norm_divisor
    return normalized, torch.rsqrt(squared_norm + parameters.eps)


def _column(value_c: Tensor, x: Tensor) -> Tensor:
    return value_c.reshape(1, -1, *([1] * (x.dim() - 2)))

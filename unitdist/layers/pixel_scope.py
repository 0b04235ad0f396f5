"""Fig. 1b: one norm per pixel over the channels. A variant to compare with, in plain tensor operations.

Axes: n samples, c channels, p pixels. The norm of a pixel is no function of (N, C) tables, so this scope
works on tensors of x's size in the statistics' type.
"""

import torch
from torch import Tensor

from unitdist.sync import sum_over_group


def forward(
    x: Tensor,
    mean_c: Tensor,
    var_c: Tensor,
    weight_c: Tensor,
    bias_c: Tensor,
    alpha_c: Tensor,
    norm_divisor: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """y = weight_c [p alpha_c + 1 - alpha_c] xh + bias_c, p = 1/sqrt(sum over c of xh^2 / n + eps) per pixel.

    x: (N, C, *spatial), any type; the rest float32 or wider. y has x's type and format.
    """
    normalized, inverse_norm = _normalize(x, mean_c, var_c, norm_divisor, eps)
    mixture = inverse_norm * _column(alpha_c, x) + _column(1 - alpha_c, x)
    y = normalized * mixture * _column(weight_c, x) + _column(bias_c, x)
    return (torch.relu_(y) if relu else y).to(x.dtype)


def backward(
    grad_y: Tensor,
    x: Tensor,
    mean_c: Tensor,
    var_c: Tensor,
    count: Tensor,
    weight_c: Tensor,
    bias_c: Tensor,
    alpha_c: Tensor,
    norm_divisor: Tensor,
    eps: float,
    relu: bool,
    batch_statistics: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, weight, bias, alpha. One sum of 2C numbers over the group.

    With g = dy (masked by the ReLU): ds = -1/2 p^3 sum over c of weight alpha g xh; dxh = weight t g + 2 ds xh / n;
    dx = r (dxh - mean(dxh) - xh mean(dxh xh)), the means over samples, pixels and ranks (0 in evaluation).
    """
    normalized, inverse_norm = _normalize(x, mean_c, var_c, norm_divisor, eps)
    weight, alpha = _column(weight_c, x), _column(alpha_c, x)
    mixture = inverse_norm * alpha + 1 - alpha
    grad = grad_y.to(mean_c.dtype)
    if relu:
        grad = grad * ((normalized * mixture * weight + _column(bias_c, x)).to(x.dtype) > 0)
    product = normalized * grad
    grad_squared_norm = -0.5 * inverse_norm.pow(3) * (product * weight * alpha).sum(1, keepdim=True)
    grad_normalized = normalized * (2 * grad_squared_norm / norm_divisor) + mixture * weight * grad
    summed = [0, *range(2, x.dim())]
    grad_weight, grad_bias = (product * mixture).sum(summed), grad.sum(summed)
    grad_alpha = weight_c * ((inverse_norm - 1) * product).sum(summed)
    grad_x = grad_normalized
    if batch_statistics:
        sums_2c = torch.cat([grad_normalized.sum(summed), (grad_normalized * normalized).sum(summed)])
        means_2c = sum_over_group(sums_2c, group_name) / count.clamp(min=1.0).to(mean_c.dtype)
        mean_grad_c, mean_product_c = means_2c.chunk(2)
        grad_x = grad_normalized - _column(mean_grad_c, x) - normalized * _column(mean_product_c, x)
    grad_x = (grad_x * _column(torch.rsqrt(var_c + eps), x)).to(x.dtype)
    return grad_x, grad_weight, grad_bias, grad_alpha


def _normalize(x: Tensor, mean_c: Tensor, var_c: Tensor, norm_divisor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normalized = (x - _column(mean_c, x)) * _column(torch.rsqrt(var_c + eps), x)
    return normalized, torch.rsqrt(normalized.square().sum(1, keepdim=True) / norm_divisor + eps)


def _column(value_c: Tensor, x: Tensor) -> Tensor:
    return value_c.reshape(1, -1, *([1] * (x.dim() - 2)))

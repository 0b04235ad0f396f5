"""The four passes in plain tensor operations, for any device, shape and memory format.

Correct everywhere and fast nowhere: they make temporaries of x's size in the statistics' type. Axes: n samples,
c channels. `unitdist.kernels.passes` says what each computes and chooses between this and the fast forms.
"""

import torch
from torch import Tensor

from unitdist.functional import moments
from unitdist.functional.moments import accumulation_dtype

__all__ = ["gradient_sums", "input_gradient", "over_space", "sample_moments", "scale_shift"]


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred sum of squares per sample and channel; of a vector's component, itself and 0."""
    if x.dim() > 2:
        return moments.sample_moments(x)
    mean_nc = x.to(accumulation_dtype(x.dtype), copy=True)
    return mean_nc, torch.zeros_like(mean_nc)


def scale_shift(x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool) -> Tensor:
    """y = scale_nc * (x - mean_c) + bias_c, then ReLU if `relu`."""
    y = (x.to(scale_nc.dtype) - over_space(mean_c[None], x)) * over_space(scale_nc, x) + over_space(bias_c[None], x)
    y = y.to(x.dtype)
    return torch.relu_(y) if relu else y


def gradient_sums(
    grad_y: Tensor, x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over space of dy and dy * (x - mean_c), dy masked by the ReLU; third, the masked dy."""
    if relu:
        grad_y = torch.ops.aten.threshold_backward(grad_y, scale_shift(x, mean_c, scale_nc, bias_c, False), 0)
    if x.dim() == 2:
        grad_nc = grad_y.to(scale_nc.dtype, copy=True)
        return grad_nc, grad_nc * (x.to(scale_nc.dtype) - mean_c), grad_y
    grad_ncp = grad_y.reshape(*x.shape[:2], -1) if x.numel() else grad_y.new_zeros(*x.shape[:2], 0)
    x_ncp = x.reshape(grad_ncp.shape)
    deviation_ncp = x_ncp.to(scale_nc.dtype) - mean_c[None, :, None]
    grad_ncp = grad_ncp.to(scale_nc.dtype)
    return grad_ncp.sum(2), (grad_ncp * deviation_ncp).sum(2), grad_y


def input_gradient(
    grad_y: Tensor, x: Tensor, mean_c: Tensor, scale_nc: Tensor, slope_nc: Tensor, offset_c: Tensor
) -> Tensor:
    """dx = scale_nc * dy + slope_nc * (x - mean_c) + offset_c."""
    deviation = x.to(scale_nc.dtype) - over_space(mean_c[None], x)
    grad_x = deviation * over_space(slope_nc, x) + over_space(offset_c[None], x) + over_space(scale_nc, x) * grad_y
    return grad_x.to(x.dtype)


def over_space(table_nc: Tensor, x: Tensor) -> Tensor:
    """View an (N, C) table so that it broadcasts over the spatial axes of x."""
    return table_nc.reshape(*table_nc.shape, *([1] * (x.dim() - 2)))

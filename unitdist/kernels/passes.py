"""The four passes over x, two forward and two backward; everything else is (N, C) tables.

Axes: n samples, c channels. x is (N, C, *spatial) of any floating type and memory format, tables and sums
are float32 or wider. The forward pass is y = scale_nc * (x - mean_c) + bias_c, then ReLU if asked.
"""

import torch
from torch import Tensor

from unitdist.functional.moments import sample_moments as plain_sample_moments


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred sum of squares over space, per sample and channel: two (N, C) tables. Reads x."""
    return plain_sample_moments(x)


def scale_shift(x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool) -> Tensor:
    """y = scale_nc * (x - mean_c) + bias_c in x's type and format, then ReLU if `relu`. Reads x, writes y."""
    y = (x.to(scale_nc.dtype) - over_space(mean_c[None], x)) * over_space(scale_nc, x) + over_space(bias_c[None], x)
    y = y.to(x.dtype)
    return torch.relu_(y) if relu else y


def gradient_sums(
    grad_y: Tensor, x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over space of dy and of dy * (x - mean_c), (N, C) each, dy masked by the recomputed ReLU.

    Third: what `input_gradient` is to be given as its grad_y. Reads x and grad_y.
    """
    if relu:
        grad_y = torch.ops.aten.threshold_backward(grad_y, scale_shift(x, mean_c, scale_nc, bias_c, False), 0)
    grad_ncp = grad_y.flatten(2).to(scale_nc.dtype) if x.dim() > 2 else grad_y.unsqueeze(2).to(scale_nc.dtype)
    x_ncp = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    deviation_ncp = x_ncp.to(scale_nc.dtype) - mean_c[None, :, None]
    return grad_ncp.sum(2), (grad_ncp * deviation_ncp).sum(2), grad_y


def input_gradient(
    grad_y: Tensor, x: Tensor, mean_c: Tensor, scale_nc: Tensor, slope_nc: Tensor, offset_c: Tensor
) -> Tensor:
    """dx = scale_nc * dy + slope_nc * (x - mean_c) + offset_c in x's type and format. Reads both, writes dx."""
    deviation = x.to(scale_nc.dtype) - over_space(mean_c[None], x)
    grad_x = over_space(scale_nc, x) * grad_y + over_space(slope_nc, x) * deviation + over_space(offset_c[None], x)
    return grad_x.to(x.dtype)


def over_space(table_nc: Tensor, x: Tensor) -> Tensor:
    """View an (N, C) table so that it broadcasts over the spatial axes of x."""
    return table_nc.reshape(*table_nc.shape, *([1] * (x.dim() - 2)))



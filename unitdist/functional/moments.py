"""Moments of a batch from moments of its samples, in a form that adds up over ranks.

Axes: n samples, c channels, p pixels (all spatial positions of a sample; 1 for vectors).
`centred` always means the sum of squared deviations from the mean of the same set.
"""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of statistics for inputs of `dtype`: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pixels_of(x: Tensor) -> int:
    """Number of spatial positions of x (N, C, *spatial): 1 for vectors (N, C)."""
    pixels = 1
    for size in x.shape[2:]:
        pixels *= size
    return pixels


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred sum of squares over space, per sample and channel (m_kc and M2_kc).

    x: (N, C, *spatial), any floating type. Returns two (N, C) tensors of `accumulation_dtype`. Two
    passes, mean first: E[x^2] - E[x]^2 would lose the variance where |mean| is much larger than std.
    """
    x_ncp = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    x_ncp = x_ncp.to(accumulation_dtype(x.dtype))
    mean_nc = x_ncp.sum(2) / max(x_ncp.shape[2], 1)
    centred_nc = (x_ncp - mean_nc.unsqueeze(2)).square().sum(2)
    return mean_nc, centred_nc


def channel_moments(mean_nc: Tensor, centred_nc: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and centred sum per channel over these samples and their pixels (mu_c and m*var_c).

    Exact merge of equal counts: mu_c = mean_k m_kc, centred = sum_k M2_kc + M sum_k (m_kc - mu_c)^2.
    Both (C,); zeros for an empty batch.
    """
    mean_c = mean_nc.sum(0) / max(mean_nc.shape[0], 1)
    centred_c = centred_nc.sum(0) + pixels * (mean_nc - mean_c).square().sum(0)
    return mean_c, centred_c


def pack_moments(mean_c: Tensor, centred_c: Tensor, count: int) -> Tensor:
    """(sum_c, sum of squares_c, count) as one float64 vector of 2C+1 numbers, which adds up over ranks.

    In float64 the plain sum of squares is harmless: at |mean|/std = 100 it loses 4 of 16 digits.
    No pivot has to be agreed between ranks, and an empty rank adds zeros.
    """
    mean = mean_c.double()
    total = mean * count
    squares = centred_c.double() + total * mean
    return torch.cat([total, squares, total.new_full((1,), count)])


def unpack_moments(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, (C,) of `dtype`, and the count (0-d float64), from summed `pack_moments`.

    A count of zero gives mean 0 and variance 0. No host synchronization.
    """
    channels = (packed.numel() - 1) // 2
    count = packed[-1]
    divisor = count.clamp(min=1.0)
    mean_c = packed[:channels] / divisor
    var_c = (packed[channels:-1] / divisor - mean_c.square()).clamp(min=0.0)
    return mean_c.to(dtype), var_c.to(dtype), count.clone()

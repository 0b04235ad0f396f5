"""What the passes of one layer share: its parameters, and what forward keeps for backward."""

from typing import NamedTuple

from torch import Tensor


class Parameters(NamedTuple):
    """A layer's parameters in the statistics' type (float32 or wider), (C,) each, and its settings."""

    weight_c: Tensor
    bias_c: Tensor
    alpha_c: Tensor
    norm_divisor: Tensor
    """n, 0-d int64 on the device."""
    eps: float
    relu: bool


class Saved(NamedTuple):
    """Tables that forward keeps for backward, in the statistics' type."""

    mean_nc: Tensor
    """m_kc, (N, C)."""
    centred_nc: Tensor
    """M2_kc, (N, C)."""
    mean_c: Tensor
    """mu_c, (C,)."""
    var_c: Tensor
    """var_c, biased, (C,)."""
    packed: Tensor
    """(sum, sum of squares, count) over all ranks, float64 (2C+1,); empty in evaluation."""
    inverse_norm_n: Tensor
    """p_k, (N,)."""


class Running(NamedTuple):
    """A layer's running statistics, moved in place by a training pass: running += weight * (batch - running)."""

    mean_c: Tensor
    """(C,), float32 or wider."""
    var_c: Tensor
    """(C,), of unbiased variances."""
    batches: Tensor
    """Batches seen, 0-d int64 on the device; advanced by one."""
    momentum: float | None
    """The weight; None: 1/batches, the mean over all batches."""

"""Unitization as pure functions of tensors: the truth that every fast path is compared with.

Axes: n samples (paper: k), c channels, p pixels, d components of a vector. Words for the paper's letters: see
README.md in this folder. Two forms of the layer are here. The literal form follows Algorithms 1 and 2
line by line and leaves the gradient to autograd. The table form needs x only through sums per
(sample, channel); the layer and its kernels are built on it.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

NormScope = Literal["image", "pixel"]


def unitize(x: Tensor, fallback: Tensor | None = None) -> Tensor:
    """Vanilla unitization, Eq. 6: x / |x| over the last axis; `fallback` where |x| = 0.

    x: (..., d). `fallback`: a unit vector (d,); by default the one with equal components 1/sqrt(d).
    """
    return unitize_modified(x, 1.0, fallback)


def unitize_modified(x: Tensor, alpha: float | Tensor, fallback: Tensor | None = None) -> Tensor:
    """Modified unitization, Eq. 8: x / (alpha |x| + 1 - alpha), one alpha in [0, 1] for all components.

    x: (..., d). Where |x| = 0 and alpha = 1 the quotient does not exist: `fallback` (d,) stands there.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    divisor = alpha * length + (1 - alpha)
    undefined = divisor == 0
    if fallback is None:
        fallback = x.new_full((x.shape[-1],), x.shape[-1] ** -0.5)
    return torch.where(undefined, fallback, x / torch.where(undefined, 1.0, divisor))


def unitize_general(x: Tensor, alpha_d: Tensor) -> Tensor:
    """General unitization, Eq. 9: ((|x| - 1) diag(alpha) + I)^-1 x, alpha in [0, 1]^d; 0 where |x| = 0.

    x: (..., d), alpha_d: (d,).
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    divisor = (length - 1) * alpha_d + 1
    undefined = divisor == 0
    return torch.where(undefined | (length == 0), 0.0, x / torch.where(undefined, 1.0, divisor))


def unitize_practical(x: Tensor, alpha_d: Tensor, eps: float = 1e-5) -> Tensor:
    """Practical unitization, Eq. 10: [alpha / sqrt(|x|^2 + eps) + 1 - alpha] * x. alpha is not constrained.

    x: (..., d), alpha_d: (d,). This is the form that is trained.
    """
    inverse = torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    return (alpha_d * inverse + 1 - alpha_d) * x


def unitization_vectors(
    x_nc: Tensor,
    weight_c: Tensor,
    bias_c: Tensor,
    alpha_c: Tensor,
    *,
    eps: float = 1e-5,
    mean_c: Tensor | None = None,
    var_c: Tensor | None = None,
) -> Tensor:
    """Algorithm 1, literally: batch normalization of vectors, then Eq. 10 without a divisor (n = 1).

    x_nc: (N, C). Training: mean and biased variance over the batch. Test: the given `mean_c`, `var_c`.
    """
    return unitization_images(x_nc, weight_c, bias_c, alpha_c, norm_divisor=1, eps=eps, mean_c=mean_c, var_c=var_c)


def unitization_images(
    x: Tensor,
    weight_c: Tensor,
    bias_c: Tensor,
    alpha_c: Tensor,
    *,
    norm_divisor: int | Tensor,
    norm_scope: NormScope = "image",
    eps: float = 1e-5,
    mean_c: Tensor | None = None,
    var_c: Tensor | None = None,
) -> Tensor:
    """Algorithm 2, literally; with `norm_scope="pixel"` the variant of Fig. 1b.

    x: (N, C, *spatial). Training: mean and biased variance over samples and pixels. Test: the given
    `mean_c`, `var_c`. image: s_k = sum over c and pixels of xh^2 / (n * pixels), one per sample.
    pixel: s_kj = sum over c of xh^2 / n, one per pixel.
    """
    x_ncp = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    if mean_c is None or var_c is None:
        mean_c = x_ncp.mean((0, 2))
        var_c = x_ncp.var((0, 2), unbiased=False)
    normalized_ncp = (x_ncp - _column(mean_c)) / torch.sqrt(_column(var_c) + eps)
    if norm_scope == "image":
        squared_norm = normalized_ncp.square().sum((1, 2), keepdim=True) / (norm_divisor * x_ncp.shape[2])
    else:
        squared_norm = normalized_ncp.square().sum(1, keepdim=True) / norm_divisor
    inverse_norm = 1 / torch.sqrt(squared_norm + eps)
    mixture = inverse_norm * _column(alpha_c) + 1 - _column(alpha_c)
    return (_column(weight_c) * mixture * normalized_ncp + _column(bias_c)).reshape(x.shape)


def _column(value_c: Tensor) -> Tensor:
    return value_c.view(1, -1, 1)


class SampleTables(NamedTuple):
    """What the forward pass knows per sample and channel (README.md beside this file)."""

    inverse_std_c: Tensor
    """r_c = 1/sqrt(var_c + eps), (C,)."""
    squares_nc: Tensor
    """q_kc = sum over pixels of xh^2, (N, C)."""
    inverse_norm_n: Tensor
    """p_k = 1/sqrt(s_k + eps), (N, 1)."""
    mixture_nc: Tensor
    """t_kc = p_k alpha_c + 1 - alpha_c, (N, C)."""
    scale_nc: Tensor
    """A_kc = weight_c t_kc r_c, (N, C): y = A_kc (x - mean_c) + bias_c."""


def sample_tables(
    mean_nc: Tensor,
    centred_nc: Tensor,
    mean_c: Tensor,
    var_c: Tensor,
    weight_c: Tensor,
    alpha_c: Tensor,
    norm_divisor: Tensor | int,
    pixels: int,
    eps: float,
    inverse_norm_n: Tensor | None = None,
) -> SampleTables:
    """The forward pass on tables, Alg. 2 lines 2 to 5, for the image scope.

    All tensors of the statistics' type; `norm_divisor` may be a 0-d tensor on the device, so that
    nothing is read back to the host. `inverse_norm_n`: p_k (N, 1), if it is known already.
    Returns `SampleTables`; y = scale_nc * (x - mean_c) + bias_c.
    """
    inverse_std_c = torch.rsqrt(var_c + eps)
    squares_nc = inverse_std_c.square() * (centred_nc + pixels * (mean_nc - mean_c).square())
    if inverse_norm_n is None:
        squared_norm_n = squares_nc.sum(1, keepdim=True) / (norm_divisor * max(pixels, 1))
        inverse_norm_n = torch.rsqrt(squared_norm_n + eps)
    mixture_nc = torch.addcmul(1 - alpha_c, inverse_norm_n, alpha_c)
    scale_nc = mixture_nc * (weight_c * inverse_std_c)
    return SampleTables(inverse_std_c, squares_nc, inverse_norm_n, mixture_nc, scale_nc)


class GradientTables(NamedTuple):
    """What the backward pass knows before ranks have talked (README.md beside this file)."""

    weight_c: Tensor
    """d weight = sum_k t_kc E_kc, (C,), of this rank's samples."""
    bias_c: Tensor
    """d bias = sum_k D_kc, (C,), of this rank's samples."""
    alpha_c: Tensor
    """d alpha = sum_k weight_c (p_k - 1) E_kc, (C,), of this rank's samples."""
    norm_n: Tensor
    """c_k = 2 ds_k / (n M), (N, 1): the share of xh in dx that comes through the sample's norm."""
    sums_2c: Tensor
    """(sum_k dxh, sum_k dxh*xh) per channel, (2C,), to be summed over all ranks: m G1 and m G2."""


def gradient_tables(
    grad_sum_nc: Tensor,
    grad_dot_nc: Tensor,
    tables: SampleTables,
    mean_nc: Tensor,
    mean_c: Tensor,
    weight_c: Tensor,
    alpha_c: Tensor,
    norm_divisor: Tensor | int,
    pixels: int,
) -> GradientTables:
    """The backward pass on tables, for the image scope.

    grad_sum_nc: D_kc = sum over pixels of dy. grad_dot_nc: sum over pixels of dy * (x - mean_c), so that
    E_kc = r_c * grad_dot_nc; both (N, C), with dy already masked where a ReLU follows.
    """
    inverse_std_c, squares_nc, inverse_norm_n, mixture_nc, _ = tables
    grad_normalized_nc = grad_dot_nc * inverse_std_c
    weighted_nc = grad_normalized_nc * weight_c
    grad_squared_norm_n = -0.5 * inverse_norm_n.pow(3) * (weighted_nc * alpha_c).sum(1, keepdim=True)
    norm_n = 2 * grad_squared_norm_n / (norm_divisor * max(pixels, 1))
    normalized_sum_nc = pixels * (mean_nc - mean_c) * inverse_std_c
    scaled_nc = mixture_nc * weight_c
    sums_2c = torch.cat(
        [
            (scaled_nc * grad_sum_nc + norm_n * normalized_sum_nc).sum(0),
            (scaled_nc * grad_normalized_nc + norm_n * squares_nc).sum(0),
        ]
    )
    return GradientTables(
        weight_c=(mixture_nc * grad_normalized_nc).sum(0),
        bias_c=grad_sum_nc.sum(0),
        alpha_c=(weighted_nc * (inverse_norm_n - 1)).sum(0),
        norm_n=norm_n,
        sums_2c=sums_2c,
    )


def input_gradient_tables(
    tables: SampleTables, norm_n: Tensor, sums_2c: Tensor | None, count: Tensor | float | None, mean_c: Tensor
) -> tuple[Tensor, Tensor]:
    """(slope_nc, offset_c) of dx = scale_nc * dy + slope_nc * (x - mean_c) + offset_c.

    slope = r^2 (c_k - G2), offset = -r G1, G = sums_2c / count. `sums_2c=None`: mean and variance were
    constants (evaluation), G1 = G2 = 0.
    """
    inverse_std_c = tables.inverse_std_c
    if sums_2c is None or count is None:
        return norm_n * inverse_std_c.square(), torch.zeros_like(mean_c)
    mean_grad_c, mean_product_c = (sums_2c / count).chunk(2)
    return (norm_n - mean_product_c) * inverse_std_c.square(), -inverse_std_c * mean_grad_c

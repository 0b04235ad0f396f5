"""The paper's bounds on the EM distance W between a layer's outputs at two iterations.

W(P, Q) = min over couplings of E |x - y| with the Euclidean norm. Every function works on samples (n, d)
taken as empirical distributions, or on moments; floating tensors, float64 inside, a Python float out.
Unprimed (old) and primed (new) are the two iterations. |.| is the l2 norm of one sample's vector.
"""

import math

import torch
from torch import Tensor

from unitdist.errors import ConfigError


def upper_bound_from_moments(
    mean_old_d: Tensor, variance_old_d: Tensor, mean_new_d: Tensor, variance_new_d: Tensor
) -> float:
    """Theorem 1: W <= sum var' + sum var + |mu' - mu| + 2, sums over the d units.

    (Through the two means: E|x - mu| <= sqrt(sum var) <= sum var + 1.)
    """
    old_mean_d, new_mean_d = mean_old_d.double(), mean_new_d.double()
    spread = variance_old_d.double().sum() + variance_new_d.double().sum()
    return float(spread + torch.linalg.vector_norm(new_mean_d - old_mean_d) + 2)


def lipschitz_moment(x_nd: Tensor, power: int, clip: float) -> float:
    """E f(x) with Theorem 2's f(x) = sum_i clip(x_i, -C, C)^p / (p C^(p-1) sqrt(d)), which is 1-Lipschitz.

    `power` is p, a whole number >= 2; `clip` is C > 0.
    """
    if power < 2 or clip <= 0:
        raise ConfigError(f"Theorem 2 needs a whole power >= 2 and a clip > 0, got power {power} and clip {clip}")
    x = x_nd.double().flatten(1)
    # (x / C)^p * C / (p sqrt d): the same number without C^(p-1), which overflows for large p.
    powers_n = (x.clamp(-clip, clip) / clip).pow(power).sum(dim=1)
    return float(powers_n.mean()) * clip / (power * math.sqrt(x.shape[1]))


def lower_bound_from_moments(x_old_nd: Tensor, x_new_nd: Tensor, power: int, clip: float) -> float:
    """Theorem 2: W >= |E f(x') - E f(x)| for the p-th moments inside [-C, C] (Kantorovich-Rubinstein)."""
    return abs(lipschitz_moment(x_new_nd, power, clip) - lipschitz_moment(x_old_nd, power, clip))


def noisy_standardized_moments(
    mean_d: Tensor, variance_d: Tensor, estimated_mean_d: Tensor, estimated_variance_d: Tensor
) -> tuple[Tensor, Tensor]:
    """True mean and variance of BN outputs (x - mu^) / sigma^ whose statistics are estimates.

    With exact mu, sigma the outputs have mean (mu - mu^) / sigma^ and variance sigma^2 / sigma^^2: the noise
    of a mini-batch's estimates is exactly what keeps them from 0 and 1.
    """
    scale_d = estimated_variance_d.double().rsqrt()
    return (mean_d.double() - estimated_mean_d.double()) * scale_d, variance_d.double() * scale_d**2


def batchnorm_upper_bound(noisy_old: tuple[Tensor, Tensor], noisy_new: tuple[Tensor, Tensor]) -> float:
    """Eq. 4: Theorem 1 for BN outputs, W <= sum (sigma'/sigma^')^2 + sum (sigma/sigma^)^2 + |m' - m| + 2.

    Arguments: `noisy_standardized_moments` at the two iterations, (mean m (d,), variance (d,)) each.
    Without noise it is 2 d + 2: BN bounds the shift only as well as the width and the noise allow.
    """
    return upper_bound_from_moments(noisy_old[0], noisy_old[1], noisy_new[0], noisy_new[1])


def batchnorm_lower_bound(
    x_old_nd: Tensor,
    x_new_nd: Tensor,
    estimates_old: tuple[Tensor, Tensor],
    estimates_new: tuple[Tensor, Tensor],
    power: int,
    clip: float,
) -> float:
    """Eq. 5: Theorem 2 for BN outputs (x - mu^) / sigma^; the moments above the second are what BN leaves free.

    `x_*_nd` are the inputs of BN, `estimates_*` its (mean (d,), variance (d,)) estimated from mini-batches.
    """
    standardized = [
        (x_nd.double() - mean_d.double()) * variance_d.double().rsqrt()
        for x_nd, (mean_d, variance_d) in ((x_old_nd, estimates_old), (x_new_nd, estimates_new))
    ]
    return lower_bound_from_moments(standardized[0], standardized[1], power, clip)


def vanilla_bound() -> float:
    """Theorem 3.1: outputs x/|x| (Eq. 6) are unit vectors, so W <= 2 whatever the iterations."""
    return 2.0


def modified_bound(alpha: float, mean_norm_old: float, mean_norm_new: float) -> float:
    """Theorem 3.2 for x / (a|x| + 1 - a) (Eq. 8), a in [0, 1]: W <= 2/a for a > 0, else E|x| + E|y|."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"Theorem 3.2 holds for alpha in [0, 1], got {alpha}")
    return 2.0 / alpha if alpha > 0 else mean_norm_old + mean_norm_new


def general_bound(alpha_d: Tensor, mean_norm_old: float, mean_norm_new: float) -> float:
    """Theorem 3.3 for ((|x| - 1) diag(a) + I)^-1 x (Eq. 9), a in [0, 1]^d.

    W <= 2 / min(a) where min(a) > 0, else E|x| + E|y| + 2. |x| are the norms of what enters the layer.
    """
    low, high = float(alpha_d.min()), float(alpha_d.max())
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"Theorem 3.3 holds for alpha in [0, 1], got values from {low} to {high}")
    return 2.0 / low if low > 0 else mean_norm_old + mean_norm_new + 2.0


def alpha_bound(alpha_c: Tensor) -> float | None:
    """2 / min(alpha) of a trained layer where Theorem 3.3 speaks, 0 < min(alpha) and max(alpha) <= 1; else None.

    The trained form (Eq. 10) does not confine alpha to [0, 1], and the bound counts in the layer's own norm,
    |xh| / sqrt(n M), before gamma and beta.
    """
    low, high = float(alpha_c.min()), float(alpha_c.max())
    return 2.0 / low if 0 < low <= high <= 1 else None


def box_example_lower_bound(clip: float, num_units: int, power: int) -> float:
    """Theorem 2 in closed form for the appendix's two uniform boxes, [C/2, C]^d and [0, C/4]^d.

    E x_i^p is 2 C^p (1 - 2^-(p+1)) / (p+1) on the first and (C/4)^p / (p+1) on the second, so

        W >= C sqrt(d) / (p (p+1)) * (2 - 2^-p - 4^-p),

    which grows with C without bound: no moment up to the p-th confines the shift of unbounded outputs.
    """
    if power < 2 or clip <= 0 or num_units < 1:
        raise ConfigError(f"the example needs C > 0, d >= 1 and a whole p >= 2, got C {clip}, d {num_units}, p {power}")
    return clip * math.sqrt(num_units) / (power * (power + 1)) * (2 - 2.0**-power - 4.0**-power)

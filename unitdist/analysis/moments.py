"""Mean, variance, skewness and kurtosis per unit: one pass, mergeable over batches and ranks.

A partial result is the number of values and the centred power sums of each unit,

    M_k = sum over values of (x - mean)^k,    k = 2, 3, 4,

in float64. Two partial results merge exactly by Pebay's pairwise formulas (P. Pebay, Formulas for Robust,
One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical Moments, 2008), so neither the
split into batches nor the number of ranks changes the result beyond rounding (1e-9 of scipy's).

Axes: n samples, c channels or units, v values of one unit (samples times pixels).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from unitdist.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count and centred power sums of every unit; all tensors (C,) float64.

    The moments are those of the values as a population: biased variance M2/n; skewness
    (M3/n) / (M2/n)^1.5; kurtosis (M4/n) / (M2/n)^2, not the excess: a Gaussian has 3. Skewness and
    kurtosis of a unit whose values are all equal are NaN.
    """

    count: float
    mean_c: Tensor
    m2_c: Tensor
    m3_c: Tensor
    m4_c: Tensor

    @property
    def variance_c(self) -> Tensor:
        """Biased variance M2 / n."""
        return self.m2_c / self.count

    @property
    def skewness_c(self) -> Tensor:
        """Third standardized moment; scipy.stats.skew."""
        return (self.m3_c / self.count) / self.variance_c**1.5

    @property
    def kurtosis_c(self) -> Tensor:
        """Fourth standardized moment; scipy.stats.kurtosis(fisher=False)."""
        return (self.m4_c / self.count) / self.variance_c**2


def values_per_unit(x: Tensor) -> Tensor:
    """(N, C, *spatial) -> (C, V) with V = N * product of the spatial sizes; (N, C) -> (C, N)."""
    assert x.dim() >= 2, "a layer's output has at least the axes sample and unit"
    return x.transpose(0, 1).flatten(1)


def moments_of(x: Tensor, layer_name: str = "moments") -> Moments:
    """Moments of one batch, (N, C) or (N, C, *spatial) of any floating type, by two passes in float64.

    Raises TrainingError, opening with `layer_name`, where a value is not finite or there is none.
    """
    values_cv = values_per_unit(x.detach()).double()
    if values_cv.shape[1] == 0:
        raise TrainingError(f"{layer_name}: no values in a tensor of shape {tuple(x.shape)}; give at least one sample")
    finite_cv = torch.isfinite(values_cv)
    if not bool(finite_cv.all()):
        bad = int((~finite_cv).sum())
        total = values_cv.numel()
        raise TrainingError(f"{layer_name}: {bad} of {total} activations are NaN or infinite; no moment is defined")
    mean_c = values_cv.mean(dim=1)
    centred_cv = values_cv - mean_c[:, None]
    # The mean is rounded: what is left of the sum of the centred values moves into it, or M3 would carry it threefold.
    rest_c = centred_cv.mean(dim=1)
    centred_cv -= rest_c[:, None]
    square_cv = centred_cv * centred_cv
    return Moments(
        count=float(values_cv.shape[1]),
        mean_c=mean_c + rest_c,
        m2_c=square_cv.sum(dim=1),
        m3_c=(square_cv * centred_cv).sum(dim=1),
        m4_c=(square_cv * square_cv).sum(dim=1),
    )


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets of values (Pebay 2008, eq. 3.1 for k = 2, 3, 4)."""
    n = a.count + b.count
    delta_c = b.mean_c - a.mean_c
    na, nb = a.count, b.count
    m2_c = a.m2_c + b.m2_c + delta_c**2 * (na * nb / n)
    m3_c = a.m3_c + b.m3_c + delta_c**3 * (na * nb * (na - nb) / n**2) + 3 * delta_c * (na * b.m2_c - nb * a.m2_c) / n
    m4_c = (
        a.m4_c
        + b.m4_c
        + delta_c**4 * (na * nb * (na * na - na * nb + nb * nb) / n**3)
        + 6 * delta_c**2 * (na * na * b.m2_c + nb * nb * a.m2_c) / n**2
        + 4 * delta_c * (na * b.m3_c - nb * a.m3_c) / n
    )
    return Moments(count=n, mean_c=a.mean_c + delta_c * (nb / n), m2_c=m2_c, m3_c=m3_c, m4_c=m4_c)


def merge_over_ranks(moments: Moments, group: dist.ProcessGroup | None = None) -> Moments:
    """Moments of the values of all ranks of `group` (None: all); itself in a job of one process.

    A collective call: every rank of the group takes part and gets the same bits, because all merge the
    same gathered parts in the order of their ranks.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return moments
    row_c = moments.mean_c
    part = torch.stack([torch.full_like(row_c, moments.count), row_c, moments.m2_c, moments.m3_c, moments.m4_c])
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    merged: Moments | None = None
    for gathered in parts:
        count = float(gathered[0, 0])
        one = Moments(count=count, mean_c=gathered[1], m2_c=gathered[2], m3_c=gathered[3], m4_c=gathered[4])
        if count > 0:
            merged = one if merged is None else merge_moments(merged, one)
    if merged is None:
        raise TrainingError("moments: no rank has a single value; measure on more samples")
    return merged


def no_moments(num_units: int, device: torch.device) -> Moments:
    """The moments of no values at all: neutral in `merge_over_ranks` (a rank that got no samples)."""
    zero_c = torch.zeros(num_units, dtype=torch.float64, device=device)
    return Moments(count=0.0, mean_c=zero_c, m2_c=zero_c, m3_c=zero_c, m4_c=zero_c)

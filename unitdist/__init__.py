"""Distributed training of image networks with Unitization, a normalization that bounds covariate shift."""

from unitdist.functional import unitize
from unitdist.layers import (
    Unitization1d,
    Unitization2d,
    convert_unitization,
    revert_unitization,
    set_norm_divisors,
)

__all__ = [
    "Unitization1d",
    "Unitization2d",
    "convert_unitization",
    "revert_unitization",
    "set_norm_divisors",
    "unitize",
]

"""Distributed training of image networks with Unitization, a normalization that bounds covariate shift."""

from typing import Any

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
    "load_pretrained",
    "revert_unitization",
    "set_norm_divisors",
    "unitize",
]


def __getattr__(name: str) -> Any:
    """`load_pretrained` is imported when it is asked for: it needs more than torch."""
    if name == "load_pretrained":
        from unitdist.hub import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

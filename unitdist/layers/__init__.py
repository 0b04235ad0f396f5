"""Unitization as modules, and what turns networks into and out of it."""

from unitdist.layers.compile import compile_norms
from unitdist.layers.convert import convert_unitization, revert_unitization
from unitdist.layers.norm_divisor import missing_norm_divisors, set_norm_divisors
from unitdist.layers.overlap import normalize_and_convolve
from unitdist.layers.unitization import Unitization1d, Unitization2d

__all__ = [
    "Unitization1d",
    "Unitization2d",
    "compile_norms",
    "convert_unitization",
    "missing_norm_divisors",
    "normalize_and_convolve",
    "revert_unitization",
    "set_norm_divisors",
]

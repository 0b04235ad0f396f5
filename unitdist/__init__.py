"""Distributed training of image networks with Unitization, a normalization that bounds covariate shift."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unitdist.functional import unitize
    from unitdist.hub import load_pretrained
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

_ROOMS = {"load_pretrained": "unitdist.hub", "unitize": "unitdist.functional"}
"""Name -> module that defines it, where that is not unitdist.layers."""


def __getattr__(name: str) -> Any:
    """Names are imported when they are asked for: `python -m unitdist doctor` has to start where torch does not import."""
    if name in __all__:
        return getattr(import_module(_ROOMS.get(name, "unitdist.layers")), name)
    if name in ("functional", "layers"):
        return import_module(f"unitdist.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Distributed training of image networks with Unitization, a normalization that bounds covariate shift."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from unitdist.version import __version__

if TYPE_CHECKING:
    from unitdist.hub import load_pretrained

if TYPE_CHECKING or sys.argv[:1] != ["-m"]:  # `python -m unitdist doctor` has to start where torch does not import
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
    "__version__",
    "convert_unitization",
    "load_pretrained",
    "revert_unitization",
    "set_norm_divisors",
    "unitize",
]

_ROOMS = {"load_pretrained": "unitdist.hub", "unitize": "unitdist.functional"}
"""Name -> module that defines it, where that is not unitdist.layers."""


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: `load_pretrained`, which needs more than torch; under `python -m` all names."""
    if name in __all__:
        return getattr(import_module(_ROOMS.get(name, "unitdist.layers")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Unitization as pure functions of tensors."""

from unitdist.functional.moments import sample_moments
from unitdist.functional.unitization import (
    unitization_images,
    unitization_vectors,
    unitize,
    unitize_general,
    unitize_modified,
    unitize_practical,
)

__all__ = [
    "sample_moments",
    "unitization_images",
    "unitization_vectors",
    "unitize",
    "unitize_general",
    "unitize_modified",
    "unitize_practical",
]

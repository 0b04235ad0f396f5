"""The exact EM distance of two small samples, by optimal assignment: the yardstick of everything else.

Needs scipy (the extra `dev`); its only door in unitdist.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from unitdist.errors import ConfigError


def exact_em_distance(x_nd: Tensor, y_nd: Tensor) -> float:
    """W(P, Q) = min over couplings of E |x - y|, Euclidean, of two empirical distributions of equal size.

    Between two sets of n points of weight 1/n an optimal coupling is a permutation (Birkhoff), so the
    assignment problem gives the distance exactly. x, y: (n, *dims) floating, flattened to vectors; float64
    inside; O(n^3), fine up to some thousands. Raises ConfigError on unequal sizes or dimensions.
    """
    x = x_nd.detach().double().flatten(1).cpu().numpy()
    y = y_nd.detach().double().flatten(1).cpu().numpy()
    if x.shape != y.shape or x.shape[0] == 0:
        raise ConfigError(f"exact_em_distance: needs samples of one size and dimension, got {x.shape} and {y.shape}")
    cost = cdist(x, y)
    row, column = linear_sum_assignment(cost)
    return float(np.mean(cost[row, column]))

"""Networks that look trained: alpha, affine parameters and running statistics away from where they start."""

import torch
from torch import nn

from unitdist import Unitization1d, Unitization2d


def disturb_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every norm's parameters and statistics; returns the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform_(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Unitization1d | Unitization2d):
                uniform_(module.alpha, -0.2, 0.8)
            if isinstance(module, Unitization1d | Unitization2d | nn.BatchNorm2d):
                uniform_(module.weight, 0.5, 1.5)
                uniform_(module.bias, -0.5, 0.5)
                uniform_(module.running_mean, -0.5, 0.5)
                uniform_(module.running_var, 0.5, 1.5)
    return model.eval()

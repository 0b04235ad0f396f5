"""Exponential moving average of the weights, kept as a state dict beside the network."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """averaged <- decay * averaged + (1 - decay) * current, after every optimizer step.

    Floating-point parameters and running statistics are averaged in float32; counters and norm divisors are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        current = module.state_dict()
        averaged = [name for name, value in current.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.state[name] for name in averaged], [current[name] for name in averaged], 1 - self.decay
        )
        for name, value in current.items():
            if not value.is_floating_point():
                self.state[name].copy_(value)

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved average; names and shapes are those of the network, which was checked before."""
        for name, value in state.items():
            self.state[name].copy_(value)

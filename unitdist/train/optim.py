"""Parameter groups and the optimizer."""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from unitdist.config import OptimConfig
from unitdist.train.timm_training import build_timm_optimizer

MOMENTS = {"sgd": 1, "lars": 1, "adamw": 2, "lamb": 2}
"""Buffers of a parameter's size that an optimizer keeps, by `optim.name`."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups, decided by module type: weights of convolutions and linear layers decay, nothing else does.

    So alpha, weight and bias of every norm, and all biases, never decay, as in the authors' code, which regularizes
    convolution and dense kernels alone. Frozen parameters are in no group.
    """
    decays = {id(module.weight) for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kernels = [parameter for parameter in trainable if id(parameter) in decays]
    rest = [parameter for parameter in trainable if id(parameter) not in decays]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, learning_rate: float, recordable: bool = False
) -> torch.optim.Optimizer:
    """The optimizer named in the config: torch's SGD and AdamW, timm's LARS and LAMB.

    `recordable`: a step can be recorded in a CUDA graph. The learning rate is then a tensor on the parameters' device, which
    torch's fused forms read there; timm's optimizers read it on the host (the config refuses them).
    """
    groups = parameter_groups(model, config.weight_decay)
    if recordable:
        rate = torch.tensor(learning_rate, device=next(model.parameters()).device)
        if config.name == "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        return torch.optim.AdamW(groups, lr=rate, betas=config.betas, fused=True, capturable=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum, nesterov=config.nesterov)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=config.betas)
    return build_timm_optimizer(
        config.name, groups, learning_rate=learning_rate, momentum=config.momentum, betas=config.betas
    )

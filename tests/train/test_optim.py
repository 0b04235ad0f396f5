"""unitdist.train.optim: every parameter in one group, kernels alone decay."""

import pytest
import torch
from torch import nn

from unitdist import Unitization2d
from unitdist.config import OptimConfig
from unitdist.train.optim import build_optimizer, parameter_groups


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        Unitization2d(4, norm_divisor=4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def test_only_convolution_and_linear_weights_decay() -> None:
    net = small_net()
    kernels, rest = parameter_groups(net, 0.1)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert [names[id(p)] for p in kernels["params"]] == ["0.weight", "2.weight", "5.weight"]
    assert sorted(names[id(p)] for p in rest["params"]) == sorted(
        ["0.bias", "1.weight", "1.bias", "1.alpha", "2.bias", "3.weight", "3.bias", "5.bias"]
    )
    assert (kernels["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_every_optimizer_takes_a_step(name: str) -> None:
    torch.manual_seed(0)
    net = small_net()
    before = net[0].weight.detach().clone()
    optimizer = build_optimizer(net, OptimConfig(name=name), learning_rate=0.01)
    net(torch.randn(3, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert torch.isfinite(net[0].weight).all() and not torch.equal(net[0].weight, before)


def test_frozen_parameters_are_left_out() -> None:
    net = small_net()
    net[0].weight.requires_grad_(False)
    kernels, rest = parameter_groups(net, 0.1)
    assert len(kernels["params"]) + len(rest["params"]) == len(list(net.parameters())) - 1

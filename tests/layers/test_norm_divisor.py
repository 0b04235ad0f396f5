"""Norm divisors for a training resolution by a dry run on the meta device."""

import pytest
import torch
from torch import nn

from unitdist import Unitization1d, Unitization2d, set_norm_divisors
from unitdist.errors import ConfigError
from unitdist.layers import missing_norm_divisors


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        Unitization2d(4, activation="relu"),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        Unitization2d(4),
        Unitization2d(4, norm_scope="pixel"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Unitization1d(4),
    )


def test_every_layer_gets_its_own_map_size_and_nothing_else_changes() -> None:
    net = network()
    net[2].eval()
    before = {name: value.clone() for name, value in net.state_dict().items() if "norm_divisor" not in name}
    rng = torch.get_rng_state()
    assert missing_norm_divisors(net) == ["1", "5"]
    assert set_norm_divisors(net, 32) == {"1": 256, "5": 64}
    assert [net[i].norm_divisor.item() for i in (1, 5, 6, 9)] == [256, 64, 1, 1]
    assert missing_norm_divisors(net) == []
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert net.training and not net[2].training and net[1].training


def test_height_and_width_and_channels() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), Unitization2d(2))
    assert set_norm_divisors(net, (6, 10), channels=1) == {"1": 60}


def test_known_divisors_are_replaced_unless_only_missing() -> None:
    net = nn.Sequential(Unitization2d(3, norm_divisor=7), Unitization2d(3))
    set_norm_divisors(net, 4, only_missing=True)
    assert [layer.norm_divisor.item() for layer in net] == [7, 16]
    set_norm_divisors(net, 8)
    assert [layer.norm_divisor.item() for layer in net] == [64, 64]


def test_a_layer_used_at_two_sizes_is_an_error_and_leaves_no_trace() -> None:
    layer = Unitization2d(3)
    net = nn.Sequential(layer, nn.MaxPool2d(2), layer)
    with pytest.raises(ConfigError, match="layer 0 is used at 64 and at 16 pixels"):
        set_norm_divisors(net, 8)
    assert missing_norm_divisors(net) == ["0"] and net.training


def test_a_model_without_such_layers_is_an_error() -> None:
    with pytest.raises(ConfigError, match="Sequential has no Unitization2d"):
        set_norm_divisors(nn.Sequential(nn.Conv2d(3, 3, 1)), 8)


@pytest.mark.parametrize("size", [0, -1, (3,), "64", 8.0, (0, 8), (8, 8, 8)])
def test_an_image_size_that_is_none_is_an_error(size: object) -> None:
    with pytest.raises(ConfigError, match=r"image_size must be a side, or \(height, width\), >= 1 px; got"):
        set_norm_divisors(network(), size)  # type: ignore[arg-type]


def test_a_model_of_other_channels_is_an_error_that_names_the_argument() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), Unitization2d(4))
    with pytest.raises(ConfigError, match=r"does not run on an image of 3 channels and 28 x 28 px \(channels=N"):
        set_norm_divisors(model, 28)
    assert set_norm_divisors(model, 28, channels=1) == {"1": 26 * 26}


def test_layers_that_are_not_reached_stay_unknown() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = Unitization2d(3), Unitization2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    net = Net()
    set_norm_divisors(net, 8)
    assert missing_norm_divisors(net) == ["unused"]

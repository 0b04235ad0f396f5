"""Networks converted from batch normalization to Unitization and back."""

import logging

import pytest
import torch
from torch import Tensor, nn

from unitdist import Unitization1d, Unitization2d, convert_unitization, revert_unitization, set_norm_divisors
from unitdist.errors import ConfigError


class NormAct(nn.BatchNorm2d):
    """Shaped like timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 1),
        NormAct(6, nn.ReLU(inplace=True), nn.Identity()),
        nn.Conv2d(6, 6, 1),
        NormAct(6, nn.SiLU(), nn.Identity()),
        nn.BatchNorm2d(6, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)),
    )
    for _ in range(2):
        net(torch.randn(4, 3, 8, 8))
    return net


def test_converted_network_computes_the_same_in_training_and_evaluation() -> None:
    x, net = torch.randn(4, 3, 8, 8), network()
    want_eval = net.eval()(x)
    want_train = net.train()(x)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    converted = network()
    assert convert_unitization(converted) is converted
    set_norm_divisors(converted, 8)
    torch.testing.assert_close(converted.eval()(x), want_eval, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(converted.train()(x), want_train, rtol=1e-4, atol=1e-5)
    for name, value in state.items():
        torch.testing.assert_close(converted.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_kinds_activations_and_parameter_objects_are_kept() -> None:
    net = network()
    parameters = [net[1].weight, net[3].bias]
    convert_unitization(net, sync=False)
    assert [type(net[i]).__name__ for i in (1, 3, 5, 6)] == ["Unitization2d"] * 2 + [
        "UnitizationAct2d",
        "Unitization2d",
    ]
    assert type(net[9][1]) is Unitization1d
    assert [net[i].activation for i in (1, 3, 5)] == [None, "relu", None] and isinstance(net[5].act, nn.SiLU)
    assert net[1].weight is parameters[0] and net[3].bias is parameters[1]
    assert not net[6].weight.requires_grad and net[6].alpha.requires_grad
    assert net[1].num_batches_tracked.item() == 2 and not net[1].sync


def test_revert_gives_back_the_same_function_and_state() -> None:
    x, net = torch.randn(4, 3, 8, 8), network()
    want, names = net.eval()(x), list(net.state_dict())
    reverted = revert_unitization(convert_unitization(net))
    torch.testing.assert_close(reverted(x), want, rtol=1e-5, atol=1e-6)
    assert set(names) <= set(reverted.state_dict())
    assert not any(isinstance(module, (Unitization1d, Unitization2d)) for module in reverted.modules())
    assert not reverted[3].training


def test_filter_sees_module_and_name_and_the_count_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    with caplog.at_level(logging.INFO):
        convert_unitization(net, filter=lambda module, name: name.startswith("9."))
    assert caplog.messages == ["converted 1 batch normalization layers to Unitization"]
    assert type(net[9][1]) is Unitization1d and type(net[1]) is nn.BatchNorm2d


def test_sync_batch_norm_and_a_model_that_is_one_layer() -> None:
    layer = convert_unitization(nn.SyncBatchNorm(4), norm_divisor=9)
    assert type(layer) is Unitization2d and layer.norm_divisor.item() == 9


def test_a_subclass_of_sync_batch_norm_is_converted() -> None:
    class Own(nn.SyncBatchNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert type(convert_unitization(nn.Sequential(Own(4)))[0]) is Unitization2d


def test_a_shared_layer_stays_shared() -> None:
    norm = nn.BatchNorm2d(3)
    net = convert_unitization(nn.Sequential(norm, nn.ReLU(), norm))
    assert net[0] is net[2]


def test_unknown_subclasses_are_left_alone() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ConfigError, match="no batch normalization layer to convert"):
        convert_unitization(nn.Sequential(Odd(3), nn.GroupNorm(1, 3)))


def test_nothing_to_revert_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no Unitization layer"):
        revert_unitization(nn.Sequential(nn.BatchNorm2d(3)))


def test_missing_running_statistics_are_an_error() -> None:
    with pytest.raises(ConfigError, match="track_running_stats"):
        convert_unitization(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


def test_timm_network_converts_and_computes_the_same() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnetv2_50", pretrained=False, num_classes=3, layers=(1, 1, 1, 1)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        want = net(x)
        convert_unitization(net)
        assert set(set_norm_divisors(net, 64).values()) == {256, 64, 16, 4}
        layers = [module for module in net.modules() if isinstance(module, Unitization2d)]
        assert {layer.activation for layer in layers} == {"relu"} and {type(layer) for layer in layers} == {
            Unitization2d
        }
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)

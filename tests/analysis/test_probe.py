"""Watching layers from outside: names, fused ReLU, inverse norms, and no trace left."""

import pytest
import torch
from torch import nn

from unitdist import Unitization1d, Unitization2d
from unitdist.analysis.probe import (
    capture_outputs,
    check_layer_names,
    evaluation_mode,
    inverse_norms,
    normalization_layers,
)
from unitdist.errors import ConfigError


def small_net(activation: str | None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        Unitization2d(4, activation=activation, norm_divisor=36),  # type: ignore[arg-type]
        nn.Identity() if activation else nn.ReLU(),
        nn.Conv2d(4, 2, 3),
        nn.BatchNorm2d(2),
        nn.GroupNorm(1, 2),
    )


def test_unknown_layer_lists_the_nearest_names() -> None:
    model = nn.ModuleDict({"norm1": nn.ReLU(), "norm2": nn.ReLU(), "head": nn.ReLU()})
    with pytest.raises(
        ConfigError, match=r"no layer named 'norm3' in ModuleDict; the nearest are norm[12], norm[12], head"
    ):
        check_layer_names(model, ["norm1", "norm3"])


def test_capture_of_an_unknown_layer_fails_before_the_forward_pass() -> None:
    with pytest.raises(ConfigError, match="nearest"), capture_outputs(small_net(None), ["7"]):
        raise AssertionError("the block must not be entered")


def test_normalization_layers_are_found_in_order() -> None:
    assert normalization_layers(small_net(None)) == ["1", "4", "5"]


def test_a_fused_relu_is_taken_off_for_the_capture_and_kept_for_the_net() -> None:
    fused, plain = small_net("relu").eval(), small_net(None).eval()
    x = torch.randn(5, 1, 8, 8)
    expected = fused(x)
    with capture_outputs(fused, ["1"]) as fused_outputs:
        seen = fused(x)
    with capture_outputs(plain, ["1"]) as plain_outputs:
        plain(x)
    assert bool((fused_outputs["1"] < 0).any())
    assert torch.equal(fused_outputs["1"], plain_outputs["1"])
    assert torch.equal(seen, expected)
    assert fused[1].activation == "relu"
    assert all(not module._forward_hooks for module in fused.modules())


def test_an_exception_in_the_block_leaves_no_hook_and_restores_the_relu() -> None:
    model = small_net("relu")
    with pytest.raises(KeyError), capture_outputs(model, ["1"]):
        raise KeyError
    assert model[1].activation == "relu"
    assert not model[1]._forward_hooks


def test_evaluation_mode_restores_each_module() -> None:
    model = small_net(None).train()
    model[4].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model[1].training and not model[4].training


@pytest.mark.parametrize("scope", ["image", "pixel"])
def test_inverse_norms_are_those_of_the_layer(scope: str) -> None:
    """With gamma = 1, beta = 0 and alpha = 1 the layer's output is p * xh."""
    layer = Unitization2d(3, norm_divisor=12, norm_scope=scope).eval().double()  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.alpha.fill_(1)
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    normalized = (x - layer.running_mean[:, None, None]) / torch.sqrt(layer.running_var + layer.eps)[:, None, None]
    p = inverse_norms(layer, x)
    assert p is not None
    p_like_x = p.view(4, 1, 1, 1) if scope == "image" else p.view(4, 1, 2, 5)
    torch.testing.assert_close(layer(x), p_like_x * normalized, rtol=1e-6, atol=1e-7)


def test_inverse_norms_of_vectors_have_no_divisor() -> None:
    layer = Unitization1d(2, eps=1e-5).eval()
    p = inverse_norms(layer, torch.tensor([[3.0, 4.0]]))
    assert p is not None
    assert p.item() == pytest.approx(1 / (25 / (1 + 1e-5) + 1e-5) ** 0.5, rel=1e-6)


def test_other_layers_have_no_inverse_norm() -> None:
    assert inverse_norms(nn.BatchNorm1d(2), torch.ones(3, 2)) is None

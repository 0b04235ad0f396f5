"""Folding the batch normalization inside Unitization away."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from unitdist import Unitization2d, convert_unitization, set_norm_divisors
from unitdist.config import ModelConfig
from unitdist.errors import CheckpointError, ConfigError
from unitdist.models.build import build_model
from unitdist.models.folding import FoldedUnitization, fold_unitization

sys.path.insert(0, str(Path(__file__).parent))
from trained import disturb_norms  # noqa: E402


def build(name: str, **keys: object) -> nn.Module:
    config = ModelConfig(**{"name": name, "num_classes": 10, **keys})  # type: ignore[arg-type]
    torch.manual_seed(0)
    return disturb_norms(build_model(config, image_size_px=28 if name.startswith("mnist") else 32))


def image(channels: int, side_px: int) -> torch.Tensor:
    return torch.randn(3, channels, side_px, side_px, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet50", "cifar_resnet20", "mnist_mlp", "mnist_resnet8"])
def test_folded_network_computes_the_same_function(name: str) -> None:
    model = build(name).double()
    folded = fold_unitization(model)
    for side_px in (28,) if name == "mnist_mlp" else (28, 45):
        x_nchw = image(1 if name.startswith("mnist") else 3, side_px)
        torch.testing.assert_close(folded(x_nchw), model(x_nchw), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, Unitization2d) for module in folded.modules())


def test_pixel_scope_folds_too() -> None:
    model = build("mnist_resnet8", norm_scope="pixel").double()
    torch.testing.assert_close(fold_unitization(model)(image(1, 28)), model(image(1, 28)), rtol=1e-9, atol=1e-9)


def test_norms_behind_a_convolution_are_folded_into_it() -> None:
    folded = fold_unitization(build("preact_resnet50"))
    places = {
        name: module.into_convolution
        for name, module in folded.named_modules()
        if isinstance(module, FoldedUnitization)
    }
    assert len(places) == 48
    assert all(into == (not name.endswith("norm1")) for name, into in places.items())
    assert folded.stages[0][0].conv1.bias is not None and folded.stages[0][0].conv3.bias is None
    assert all(fold_unitization(build("mnist_mlp")).layers[3 * index + 1].into_convolution for index in range(11))


def test_training_forms_of_the_blocks_fold_alike() -> None:
    model = build("preact_resnet18", fold_residual=True, overlap_sync=True).double()
    folded = fold_unitization(model)
    assert folded.stages[0][0].norm2.into_convolution and model.stages[0][0].fold_residual
    torch.testing.assert_close(folded(image(3, 45)), model(image(3, 45)), rtol=1e-9, atol=1e-9)


def test_raw_input_that_two_layers_read_is_not_scaled() -> None:
    model = build("preact_resnet18", stem_norm=True)
    folded = fold_unitization(model)
    assert folded.stem_norm.into_convolution
    assert not folded.stages[0][0].norm1.into_convolution


def test_channels_without_alpha_need_no_norm() -> None:
    model = build("mnist_resnet8")
    with torch.no_grad():
        model.stem_norm.alpha.zero_()
        model.final_norm.alpha.zero_()
        model.final_norm.alpha[3] = 0.5
    folded = fold_unitization(model)
    assert not folded.stem_norm.has_norm and folded.final_norm.has_norm
    assert "no norm (alpha = 0)" in repr(folded.stem_norm) and "norm_divisor=49" in repr(folded.final_norm)
    torch.testing.assert_close(folded(image(1, 28).float()), model(image(1, 28).float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "tinynet_e", "densenet121"])
def test_converted_timm_models_fold(name: str) -> None:
    model = convert_unitization(timm.create_model(name, num_classes=5)).double()
    set_norm_divisors(model, 64)
    disturb_norms(model)
    folded = fold_unitization(model)
    assert any(module.into_convolution for module in folded.modules() if isinstance(module, FoldedUnitization))
    torch.testing.assert_close(folded(image(3, 64)), model(image(3, 64)), rtol=1e-8, atol=1e-8)


class SharedNorm(nn.Module):
    """One norm layer behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = Unitization2d(4, norm_divisor=16)
        self.same_norm = self.norm

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        x_nchw = self.same_norm(self.second(self.norm(self.first(x_nchw))))
        return x_nchw.mean((2, 3))


class Untraceable(nn.Module):
    """Its path depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), Unitization2d(4, norm_divisor=16)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        y_nchw: torch.Tensor = self.norm(self.conv(x_nchw))
        return y_nchw if float(x_nchw.detach().sum()) > 0 else -y_nchw


@pytest.mark.parametrize("kind", [SharedNorm, Untraceable])
def test_where_a_convolution_cannot_be_folded_the_function_stays(kind: type[nn.Module]) -> None:
    model = disturb_norms(kind()).double()
    folded = fold_unitization(model)
    assert not any(module.into_convolution for module in folded.modules() if isinstance(module, FoldedUnitization))
    torch.testing.assert_close(folded(image(3, 4)), model(image(3, 4)), rtol=1e-9, atol=1e-9)


def test_untraceable_network_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        fold_unitization(Untraceable())
    assert "not folded into convolutions: Untraceable cannot be traced" in caplog.text


def test_the_given_network_is_left_as_it_was() -> None:
    model = build("mnist_resnet8").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold_unitization(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_errors_name_the_layer_and_the_reason() -> None:
    with pytest.raises(CheckpointError, match=r"the norm divisor of 1 is not known \(1 in all\)"):
        fold_unitization(nn.Sequential(nn.Conv2d(3, 4, 1), Unitization2d(4)))
    with pytest.raises(ConfigError, match="Conv2d has no Unitization layer"):
        fold_unitization(nn.Conv2d(3, 4, 1))

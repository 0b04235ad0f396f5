"""timm's models through the one door."""

import sys

import pytest
import timm
import torch
from torch import nn

from unitdist import Unitization2d
from unitdist.config import ModelConfig
from unitdist.errors import ConfigError
from unitdist.layers import missing_norm_divisors
from unitdist.models.build import build_model


def build(name: str, norm: str = "unitization", image_size_px: int = 64, **keys: object) -> nn.Module:
    config = ModelConfig(**{"name": name, "norm": norm, "num_classes": 10, **keys})  # type: ignore[arg-type]
    return build_model(config, image_size_px=image_size_px)


def test_converted_resnet18_equals_timms_batchnorm_net_at_alpha_zero() -> None:
    torch.manual_seed(1)
    batchnorm = build("timm:resnet18", "batchnorm").double()
    torch.manual_seed(1)
    unitization = build("timm:resnet18").double()
    x_nchw = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(unitization(x_nchw), batchnorm(x_nchw), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(unitization.eval()(x_nchw), batchnorm.eval()(x_nchw), rtol=1e-10, atol=1e-10)


def test_batchnorm_arm_is_timms_own_model() -> None:
    torch.manual_seed(1)
    ours = build("timm:resnet18", "batchnorm").state_dict()
    torch.manual_seed(1)
    theirs = timm.create_model("resnet18", num_classes=10).state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_norm_divisors_are_the_map_sizes() -> None:
    model = build("timm:resnet18")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Unitization2d)}
    assert len(layers) == 20 and missing_norm_divisors(model) == []
    assert int(layers["bn1"].norm_divisor) == 32**2
    assert int(layers["layer1.0.bn1"].norm_divisor) == 16**2
    assert int(layers["layer4.1.bn2"].norm_divisor) == 2**2
    given = build("timm:resnet18", norm_divisor=49)
    assert {int(module.norm_divisor) for module in given.modules() if isinstance(module, Unitization2d)} == {49}


def message_of(name: str, norm: str = "unitization", **keys: object) -> str:
    with pytest.raises(ConfigError) as caught:
        build(name, norm, **keys)
    return str(caught.value)


def test_unknown_timm_model_names_the_nearest() -> None:
    message = message_of("timm:resnet1O1")
    assert message.startswith(f"model.name: timm {timm.__version__} has no model 'resnet1O1' (did you mean ")
    assert "resnet101" in message


def test_model_without_batch_norm_is_an_error() -> None:
    assert "has no batch normalization layer to convert" in message_of("timm:vit_tiny_patch16_224")


def test_what_timm_models_cannot_have_is_an_error() -> None:
    message = message_of("timm:resnet18", "groupnorm", group_norm_groups=2)
    assert message == (
        "model.norm: groupnorm is for unitdist's own nets; timm:resnet18 can have unitization or batchnorm"
    )
    assert message_of("timm:resnet18", raw_projection=False).startswith(
        "model.raw_projection: timm:resnet18 has no such"
    )


def test_missing_timm_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    message = message_of("timm:resnet18")
    assert message.startswith("model.name: timm:resnet18 needs timm, which cannot be imported")
    assert message.endswith("pip install timm")

"""`convert_unitization` on every family of timm and torchvision that has batch normalization."""

import copy
import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unitdist import Unitization1d, Unitization2d, convert_unitization, revert_unitization, set_norm_divisors
from unitdist.layers import missing_norm_divisors

# timm module: (its smallest model with batch normalization, side in px at which it is tried). Fast ones first.
FAST_FAMILIES = {
    "byobnet": ("test_byobnet", 64),
    "densenet": ("densenet121", 64),
    "dla": ("dla46x_c", 64),
    "efficientnet": ("tinynet_e", 64),
    "ghostnet": ("ghostnet_050", 64),
    "hrnet": ("hrnet_w18_small", 64),
    "inception_next": ("inception_next_atto", 64),
    "maxxvit": ("test_coatnet", 160),
    "mobilenetv3": ("lcnet_035", 64),
    "mobilevit": ("mobilevit_xxs", 64),
    "regnet": ("regnetx_002", 64),
    "resnet": ("resnet10t", 64),
    "resnetv2": ("resnetv2_18", 64),
    "starnet": ("starnet_s050", 64),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
}
SLOW_FAMILIES = {
    "byoanet": ("botnet26t_256", 256),
    "convmixer": ("convmixer_768_32", 64),
    "cpubone": ("cpubone_nano", 64),
    "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64),
    "dpn": ("dpn48b", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 224),
    "efficientvim": ("efficientvim_m1", 64),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 224),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 64),
    "hardcorenas": ("hardcorenas_b", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "iformer": ("iformer_t", 64),
    "inception_resnet_v2": ("inception_resnet_v2", 128),
    "inception_v3": ("inception_v3", 128),
    "inception_v4": ("inception_v4", 128),
    "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128s", 224),
    "lowformer": ("lowformer_b0", 64),
    "nasnet": ("nasnetalarge", 128),
    "nextvit": ("nextvit_small", 64),
    "pnasnet": ("pnasnet5large", 128),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m1", 64),
    "res2net": ("res2next50", 64),
    "resnest": ("resnest14d", 64),
    "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "shvit": ("shvit_s1", 64),
    "sknet": ("skresnet18", 64),
    "swiftformer": ("swiftformer_xs", 224),
    "tiny_vit": ("tiny_vit_5m_224", 64),
    "tresnet": ("tresnet_m", 64),
    "vgg": ("vgg11_bn", 64),
    "vision_transformer_hybrid": ("vit_base_resnet26d_224", 224),
    "visformer": ("visformer_tiny", 224),
    "volo": ("volo_d1_224", 224),
    "xception": ("legacy_xception", 64),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_nano_12_p8_224", 224),
}
TORCHVISION = {
    "resnet18": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x0_5": 64,
    "mnasnet0_5": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "densenet121": 64,
    "googlenet": 64,
}
SLOW_TORCHVISION = {"vgg11_bn": 64, "inception_v3": 128, "resnext50_32x4d": 64, "wide_resnet50_2": 64}


def logits_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a model puts out; some put out logits and more in training."""
    return output if isinstance(output, Tensor) else output[0]


def disturb(model: nn.Module) -> None:
    """Running statistics and affine parameters that are not the initial ones; no layer scale or last norm near zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                assert module.running_mean is not None and module.running_var is not None
                shape = module.running_mean.shape
                module.running_mean.copy_(0.1 * torch.randn(shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
                module.weight.copy_(0.5 + torch.rand(shape, generator=generator))
                module.bias.copy_(0.1 * torch.randn(shape, generator=generator))


def seeded_forward(model: nn.Module, x_nchw: Tensor) -> Tensor:
    """Dropout and drop path draw the same numbers in both models."""
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    return logits_of(model(x_nchw))


def check(batchnorm: nn.Module, side_px: int) -> None:
    """Converted outputs equal in evaluation and training, state kept, one training step finite, and back again."""
    batchnorm = batchnorm.double()
    disturb(batchnorm)
    expected_state = copy.deepcopy(batchnorm.state_dict())
    unitization = convert_unitization(copy.deepcopy(batchnorm))
    norms = [module for module in batchnorm.modules() if isinstance(module, _BatchNorm)]
    converted = [module for module in unitization.modules() if isinstance(module, Unitization1d | Unitization2d)]
    assert len(converted) == len(norms) > 0
    assert not any(isinstance(module, _BatchNorm) for module in unitization.modules())
    set_norm_divisors(unitization, side_px)
    assert missing_norm_divisors(unitization) == []
    state = unitization.state_dict()
    for name, value in expected_state.items():
        assert torch.equal(state[name], value), name
    x_nchw = torch.randn(3, 3, side_px, side_px, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for training in (False, True):
        with torch.no_grad():
            expected = seeded_forward(batchnorm.train(training), x_nchw)
            found = seeded_forward(unitization.train(training), x_nchw)
        scale = expected.abs().max()
        assert torch.isfinite(expected).all() and scale > 0
        assert (found - expected).abs().max() < 1e-7 * scale, f"training={training}"
    check_training_step(unitization, x_nchw)
    reverted = revert_unitization(unitization)
    assert list(reverted.state_dict()) == list(expected_state)


def check_training_step(model: nn.Module, x_nchw: Tensor) -> None:
    """Loss and gradients are finite, and alpha moves."""
    loss = nn.functional.cross_entropy(seeded_forward(model.train(), x_nchw), torch.tensor([0, 1, 2]))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(name.endswith("alpha") and gradient.abs().sum() > 0 for name, gradient in gradients.items())


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_timm_family_converts(family: str) -> None:
    name, side_px = FAST_FAMILIES[family]
    check(timm.create_model(name, num_classes=5), side_px)


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW_FAMILIES)
def test_larger_timm_family_converts(family: str) -> None:
    name, side_px = SLOW_FAMILIES[family]
    check(timm.create_model(name, num_classes=5), side_px)


def test_convnext_with_batch_norms_converts() -> None:
    check(timm.create_model("convnext_atto", num_classes=5, norm_layer="batchnorm2d", conv_mlp=True), 64)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_model_converts(name: str) -> None:
    arguments = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    check(torchvision.models.get_model(name, weights=None, num_classes=5, **arguments), TORCHVISION[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_TORCHVISION)
def test_larger_torchvision_model_converts(name: str) -> None:
    arguments = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    check(torchvision.models.get_model(name, weights=None, num_classes=5, **arguments), SLOW_TORCHVISION[name])


@pytest.mark.slow
def test_every_timm_module_with_batch_norms_is_listed() -> None:
    known = {**FAST_FAMILIES, **SLOW_FAMILIES, "timm": "unitdist.timm, where another test has imported it"}
    for family in sorted(set(timm.list_modules()) - set(known)):
        for name in sorted(timm.list_models(module=family), key=len)[:2]:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=5)
            assert not any(isinstance(module, _BatchNorm) for module in model.modules()), (family, name)

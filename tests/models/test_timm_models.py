"""`import unitdist.timm`: registered models, and norm layers for timm's own."""

from functools import partial

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import unitdist.timm
from unitdist import Unitization2d
from unitdist.config import ModelConfig
from unitdist.errors import ConfigError
from unitdist.layers import missing_norm_divisors
from unitdist.models.build import build_model

DEPTHS = (18, 34, 50, 101, 152)
NAMES = [f"preact_resnet{depth}_{arm}" for depth in DEPTHS for arm in ("unit", "bn")]


def image(side_px: int = 64, samples: int = 2) -> Tensor:
    return torch.randn(samples, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


def create(name: str = "preact_resnet18_unit", **keys: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **keys)
    return model


def test_models_are_registered() -> None:
    assert sorted(timm.list_models("preact_resnet*")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_registered_model_is_unitdists_own_net(name: str) -> None:
    base, arm = name.rsplit("_", 1)
    config = ModelConfig(name=base, norm="unitization" if arm == "unit" else "batchnorm", num_classes=11)
    with torch.device("meta"):
        own = build_model(config, image_size_px=224).state_dict()
        theirs = timm.create_model(name, num_classes=11).state_dict()
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in theirs.items()}


def test_checkpoint_of_build_model_gives_the_same_logits() -> None:
    own = build_model(ModelConfig(name="preact_resnet18", num_classes=11), image_size_px=64).eval()
    theirs = create(num_classes=11, img_size=64).eval()
    theirs.load_state_dict(own.state_dict())
    assert torch.equal(own(image()), theirs(image()))


def test_both_arms_start_from_the_same_weights() -> None:
    unit, batchnorm = create("preact_resnet18_unit").state_dict(), create("preact_resnet18_bn").state_dict()
    assert set(batchnorm) < set(unit)
    assert all(torch.equal(unit[name], value) for name, value in batchnorm.items())


def test_cfg_gives_the_data_config() -> None:
    data = resolve_data_config({}, model=create("preact_resnet18_bn"))
    assert data["input_size"] == (3, 224, 224) and data["crop_pct"] == 0.875
    assert data["mean"] == (0.485, 0.456, 0.406) and data["std"] == (0.229, 0.224, 0.225)


def test_norm_divisors_follow_img_size_or_the_first_batch() -> None:
    def first_divisor(model: nn.Module) -> int:
        return int(model.stages[0][0].norm1.norm_divisor)

    assert first_divisor(create()) == 56**2
    assert first_divisor(create(img_size=160)) == 40**2
    open_model = create(fix_norm_divisors=False)
    assert len(missing_norm_divisors(open_model)) == 16
    open_model(image())
    assert first_divisor(open_model) == 16**2 and missing_norm_divisors(open_model) == []


def test_switches_of_the_paper_are_arguments() -> None:
    model = create(stem_norm=True, final_norm=True, raw_projection=False)
    assert isinstance(model.stem_norm, Unitization2d) and isinstance(model.final_norm, Unitization2d)
    assert not model.stages[1][0].raw_projection
    assert create("preact_resnet50_unit", stride_in_first_conv=False).stages[1][0].conv2.stride == (2, 2)


def test_forward_is_features_then_head() -> None:
    model = create(num_classes=11).eval()
    features = model.forward_features(image())
    assert features.shape == (2, 512, 2, 2)
    assert torch.equal(model.forward_head(features), model(image()))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))


def test_reset_classifier_changes_only_the_head() -> None:
    model = create(num_classes=11).eval()
    before = model.forward_features(image())
    model.reset_classifier(5)
    assert model.num_classes == 5 and model.get_classifier() is model.classifier
    assert model(image()).shape == (2, 5)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image()), before.mean((2, 3)))
    model.reset_classifier(0, "")
    assert torch.equal(model(image()), before)
    assert create(num_classes=0, img_size=64)(image()).shape == (2, 512)


def test_features_only_gives_stem_and_stages() -> None:
    extractor = create("preact_resnet50_unit", features_only=True).eval()
    maps = extractor(image())
    assert [tuple(features.shape[1:]) for features in maps] == [
        (64, 32, 32),
        (256, 16, 16),
        (512, 8, 8),
        (1024, 4, 4),
        (2048, 2, 2),
    ]
    assert extractor.feature_info.channels() == [64, 256, 512, 1024, 2048]
    assert extractor.feature_info.reduction() == [2, 4, 8, 16, 32]
    some = create("preact_resnet50_unit", features_only=True, out_indices=(1, 3)).eval()
    assert torch.equal(some(image())[1], maps[3])
    assert not hasattr(some.model, "stages.3") and len(some.model.stages) == 3


def test_forward_intermediates_agrees_with_forward_features() -> None:
    model = create(final_norm=True).eval()
    final, maps = model.forward_intermediates(image(), indices=2, norm=True)
    assert torch.equal(final, model.forward_features(image())) and torch.equal(maps[-1], final)
    raw = model.forward_intermediates(image(), indices=[-1], intermediates_only=True)
    assert torch.equal(model.final_relu(model.final_norm(raw[0])), final)
    stopped, maps = model.forward_intermediates(image(), indices=[0, 2], stop_early=True)
    assert torch.equal(stopped, maps[-1]) and maps[0].shape == (2, 64, 32, 32)
    with pytest.raises(ConfigError, match="has NCHW only"):
        model.forward_intermediates(image(), output_fmt="NLC")


def test_grad_checkpointing_gives_the_same_gradients_and_statistics() -> None:
    models = [
        create("preact_resnet18_unit", num_classes=3, img_size=64),
        create("preact_resnet18_unit", num_classes=3, img_size=64),
    ]
    models += [create("preact_resnet18_bn", num_classes=3), create("preact_resnet18_bn", num_classes=3)]
    for plain, checkpointed in zip(models[::2], models[1::2], strict=True):
        checkpointed.set_grad_checkpointing()
        for model in (plain, checkpointed):
            for _ in range(2):
                nn.functional.cross_entropy(model(image()), torch.tensor([0, 2])).backward()
        for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad), name
        for (name, one), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
            assert torch.equal(one, other), name
        checkpointed.set_grad_checkpointing(False)
        assert not checkpointed.grad_checkpointing


def test_timms_optimizers_leave_norms_without_decay() -> None:
    model = create("preact_resnet18_unit")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=1e-4)
    decayed = {
        names[id(parameter)]
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert decayed == {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert len(model.no_weight_decay()) == 3 * 16 and "stages.0.0.norm1.alpha" in model.no_weight_decay()
    layered = create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=1e-4, layer_decay=0.8)
    scales = {
        names[id(parameter)]: group["lr_scale"] for group in layered.param_groups for parameter in group["params"]
    }
    assert scales["stem_conv.weight"] < scales["stages.0.0.conv1.weight"] < scales["stages.3.1.conv2.weight"] < 1
    assert scales["classifier.weight"] == 1


def test_dropout_before_the_classifier_acts_in_training_only() -> None:
    model = create(num_classes=3, drop_rate=0.5, img_size=64)
    assert not torch.equal(model(image()), model(image()))
    assert torch.equal(model.eval()(image()), model(image()))


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("resnet18", unitdist.timm.norm_layer),
        ("resnet18", partial(unitdist.timm.norm_layer, eps=1e-5, norm_divisor=49)),
        ("regnetx_002", unitdist.timm.norm_act_layer),
        ("resnetv2_18", unitdist.timm.norm_act_layer),
        ("tinynet_e", partial(unitdist.timm.norm_act_layer, act_layer="silu")),
    ],
)
def test_norm_layer_functions_build_timms_own_models(name: str, norm: object) -> None:
    batchnorm, unit = create(name, num_classes=5).double(), create(name, num_classes=5, norm_layer=norm).double()
    layers = [module for module in unit.modules() if isinstance(module, Unitization2d)]
    assert len(layers) == sum(isinstance(module, nn.BatchNorm2d) for module in batchnorm.modules())
    unit.load_state_dict(batchnorm.state_dict())
    found, expected = unit(image(64, 4).double()), batchnorm(image(64, 4).double())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_norm_act_layer_fuses_relu_and_appends_anything_else() -> None:
    assert unitdist.timm.norm_act_layer(4).activation == "relu"
    assert unitdist.timm.norm_act_layer(4, apply_act=False).activation is None
    silu = unitdist.timm.norm_act_layer(4, act_layer=nn.SiLU, norm_divisor=9)
    assert isinstance(silu.act, nn.SiLU) and silu.activation is None and int(silu.norm_divisor) == 9
    dropped = unitdist.timm.norm_act_layer(4, drop_layer=nn.Dropout2d)
    assert isinstance(dropped.drop, nn.Dropout2d) and isinstance(dropped.act, nn.ReLU)


def test_timms_sync_bn_conversion_leaves_unit_nets_alone() -> None:
    model = create()
    kinds = [type(module) for module in model.modules()]
    converted = timm.layers.convert_sync_batchnorm(model)
    assert [type(module) for module in converted.modules()] == kinds

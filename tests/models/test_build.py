"""Every name builds, with the parameters that arithmetic demands, from the same draws in every arm."""

import pytest
import torch
from torch import nn

from unitdist import Unitization1d, Unitization2d
from unitdist.config import ModelConfig
from unitdist.errors import ConfigError
from unitdist.layers import missing_norm_divisors
from unitdist.models.build import MODEL_NAMES, build_model

# name: (classes, parameters of convolutions and linear layers, channels over all norms, weighted layers).
GOLDEN = {
    "preact_resnet18": (1000, 11_679_912, 3_392, 18),
    "preact_resnet34": (1000, 21_780_648, 7_104, 34),
    "preact_resnet50": (1000, 25_503_912, 20_672, 50),
    "preact_resnet101": (1000, 44_443_816, 46_784, 101),
    "preact_resnet152": (1000, 60_041_384, 69_824, 152),
    "cifar_resnet20": (10, 270_906, 704, 20),
    "cifar_resnet110": (10, 1_722_426, 4_064, 110),
    "cifar_resnet164": (100, 1_702_164, 12_128, 164),
    "mnist_mlp": (10, 169_290, 1_008, 12),
    "mnist_resnet8": (10, 77_082, 256, 8),
}
PARAMETERS_PER_CHANNEL = {"unitization": 3, "batchnorm": 2, "groupnorm": 2}


def config_of(name: str, norm: str = "unitization", **keys: object) -> ModelConfig:
    """The config of that name with a number of groups that divides every layer."""
    groups = 4 if norm == "groupnorm" else None
    return ModelConfig(**{"name": name, "norm": norm, "num_classes": 10, "group_norm_groups": groups, **keys})  # type: ignore[arg-type]


def side_px(name: str) -> int:
    return 28 if name.startswith("mnist") else 32 if name.startswith("cifar") else 224


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def weighted_layers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of all convolutions and linear layers by name."""
    kinds = (nn.Conv2d, nn.Linear)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


def test_golden_table_names_every_model() -> None:
    assert set(GOLDEN) == set(MODEL_NAMES)


@pytest.mark.parametrize("norm", PARAMETERS_PER_CHANNEL)
@pytest.mark.parametrize("name", GOLDEN)
def test_parameter_count_is_golden(name: str, norm: str) -> None:
    classes, weights, norm_channels, depth = GOLDEN[name]
    with torch.device("meta"):
        model = build_model(config_of(name, norm, num_classes=classes), image_size_px=side_px(name))
    projections = [part for part in weighted_layers(model) if part.endswith("projection")]
    assert count(model) == weights + PARAMETERS_PER_CHANNEL[norm] * norm_channels
    assert len(weighted_layers(model)) - len(projections) == depth


def test_resnet101_count_follows_from_the_paper_by_arithmetic() -> None:
    stem = 7 * 7 * 3 * 64
    stage1 = (64 * 64 + 2 * 256 * 64) + 3 * (9 * 64 * 64 + 64 * 256) + 64 * 256
    stage2 = (256 * 128 + 3 * 512 * 128) + 4 * (9 * 128 * 128 + 128 * 512) + 256 * 512
    stage3 = (512 * 256 + 22 * 1024 * 256) + 23 * (9 * 256 * 256 + 256 * 1024) + 512 * 1024
    stage4 = (1024 * 512 + 2 * 2048 * 512) + 3 * (9 * 512 * 512 + 512 * 2048) + 1024 * 2048
    classifier = 2048 * 1000 + 1000
    block_inputs = (64 + 2 * 256) + (256 + 3 * 512) + (512 + 22 * 1024) + (1024 + 2 * 2048)
    inner = 2 * (3 * 64 + 4 * 128 + 23 * 256 + 3 * 512)
    with torch.device("meta"):
        model = build_model(config_of("preact_resnet101", num_classes=1000), image_size_px=224)
    assert count(model) == stem + stage1 + stage2 + stage3 + stage4 + classifier + 3 * (block_inputs + inner)


def test_resnet20_count_follows_from_the_paper_by_arithmetic() -> None:
    stem = 9 * 3 * 16
    stage1 = 6 * 9 * 16 * 16
    stage2 = 9 * 16 * 32 + 5 * 9 * 32 * 32 + 16 * 32
    stage3 = 9 * 32 * 64 + 5 * 9 * 64 * 64 + 32 * 64
    classifier = 64 * 10 + 10
    norms = 16 + 6 * 16 + (16 + 5 * 32) + (32 + 5 * 64) + 64
    model = build_model(config_of("cifar_resnet20"), image_size_px=32)
    assert count(model) == stem + stage1 + stage2 + stage3 + classifier + 3 * norms


@pytest.mark.parametrize("name", ["preact_resnet18", "cifar_resnet20", "cifar_resnet164", "mnist_mlp", "mnist_resnet8"])
def test_same_seed_gives_byte_identical_weights_in_every_arm(name: str) -> None:
    arms = {}
    for norm in PARAMETERS_PER_CHANNEL:
        torch.manual_seed(3)
        arms[norm] = weighted_layers(build_model(config_of(name, norm), image_size_px=side_px(name)))
    for norm in ("batchnorm", "groupnorm"):
        assert list(arms[norm]) == list(arms["unitization"])
        for layer, weight in arms["unitization"].items():
            assert torch.equal(weight, arms[norm][layer]), layer


def test_another_seed_gives_other_weights() -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(weighted_layers(build_model(config_of("mnist_resnet8"), image_size_px=28)))
    assert not torch.equal(models[0]["stem_conv"], models[1]["stem_conv"])


def test_norm_parameters_start_at_one_zero_zero() -> None:
    model = build_model(config_of("mnist_resnet8"), image_size_px=28)
    layers = [module for module in model.modules() if isinstance(module, Unitization2d)]
    assert len(layers) == 8
    for layer in layers:
        assert torch.equal(layer.weight, torch.ones_like(layer.weight))
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
        assert torch.equal(layer.alpha, torch.zeros_like(layer.alpha))


def test_weights_have_he_variance_over_fan_in() -> None:
    torch.manual_seed(0)
    model = build_model(config_of("cifar_resnet110"), image_size_px=32)
    for name, weight in weighted_layers(model).items():
        ratio = weight.detach().var() * weight[0].numel() / 2
        # The standard error of a variance from n normal draws is sqrt(2/n): five of them.
        assert abs(float(ratio) - 1) < 5 * (2 / weight.numel()) ** 0.5, name
    assert torch.equal(model.classifier.bias, torch.zeros(10))


@pytest.mark.parametrize("name", ["preact_resnet18", "cifar_resnet20", "mnist_mlp", "mnist_resnet8"])
def test_unitization_arm_starts_as_the_batchnorm_arm(name: str) -> None:
    torch.manual_seed(5)
    channels = 1 if name.startswith("mnist") else 3
    x_nchw = torch.randn(6, channels, 28, 28, dtype=torch.float64)
    logits = {}
    for norm in ("unitization", "batchnorm"):
        torch.manual_seed(7)
        model = build_model(config_of(name, norm), image_size_px=28).double()
        logits[norm] = (model(x_nchw), model.eval()(x_nchw))
    for unitization, batchnorm in zip(*logits.values(), strict=True):
        torch.testing.assert_close(unitization, batchnorm, rtol=1e-9, atol=1e-9)


def test_batchnorm_checkpoint_loads_into_the_unitization_arm() -> None:
    batchnorm = build_model(config_of("cifar_resnet20", "batchnorm"), image_size_px=32)
    unitization = build_model(config_of("cifar_resnet20"), image_size_px=32)
    with torch.no_grad():
        for buffer in batchnorm.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    unitization.load_state_dict(batchnorm.state_dict())
    x_nchw = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(unitization.eval()(x_nchw), batchnorm.eval()(x_nchw), rtol=1e-4, atol=1e-4)


def test_config_settings_reach_every_layer() -> None:
    keys = {"norm_divisor": 77, "norm_eps": 1e-3, "norm_momentum": 0.25}
    model = build_model(config_of("mnist_resnet8", **keys), image_size_px=28, sync=False)
    for layer in (module for module in model.modules() if isinstance(module, Unitization2d)):
        assert int(layer.norm_divisor) == 77
        assert (layer.eps, layer.momentum, layer.sync, layer.norm_scope) == (1e-3, 0.25, False, "image")


def test_pixel_scope_reaches_every_layer_with_divisor_one() -> None:
    model = build_model(config_of("mnist_resnet8", norm_scope="pixel"), image_size_px=28)
    layers = [module for module in model.modules() if isinstance(module, Unitization2d)]
    assert {(layer.norm_scope, int(layer.norm_divisor)) for layer in layers} == {("pixel", 1)}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_prints_its_norms(name: str) -> None:
    for norm, shown in (("batchnorm", "BatchNorm"), ("groupnorm", "GroupNorm(4"), ("unitization", "norm_divisor=")):
        with torch.device("meta"):
            assert shown in repr(build_model(config_of(name, norm), image_size_px=side_px(name)))


def test_norm_divisors_are_known_after_build() -> None:
    for name in ("preact_resnet18", "cifar_resnet20", "mnist_mlp", "mnist_resnet8"):
        assert missing_norm_divisors(build_model(config_of(name), image_size_px=28)) == []


def test_mnist_mlp_norms_vectors_without_fusing_the_relu() -> None:
    model = build_model(config_of("mnist_mlp"), image_size_px=28)
    norms = [module for module in model.modules() if isinstance(module, Unitization1d)]
    assert [norm.num_features for norm in norms] == [100] * 10 + [8]
    assert {(norm.activation, int(norm.norm_divisor)) for norm in norms} == {(None, 1)}


def message_of(config: ModelConfig, image_size_px: int = 32) -> str:
    with pytest.raises(ConfigError) as caught:
        build_model(config, image_size_px=image_size_px)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_unknown_model_names_the_nearest() -> None:
    message = message_of(config_of("preact_resnet100"))
    assert message.startswith("model.name: unknown model 'preact_resnet100' (did you mean preact_resnet101")
    assert "known: preact_resnet18, " in message and message.endswith("timm:NAME")


def test_group_norm_groups_must_divide_the_channels() -> None:
    message = message_of(config_of("cifar_resnet20", "groupnorm", group_norm_groups=32))
    assert message == "model.group_norm_groups: 32 does not divide the 16 channels of a layer of cifar_resnet20"


def test_group_norm_channels_must_divide_the_channels() -> None:
    keys = {"group_norm_groups": None, "group_norm_channels": 3}
    message = message_of(config_of("cifar_resnet20", "groupnorm", **keys))
    assert message == "model.group_norm_channels: 3 does not divide the 16 channels of a layer of cifar_resnet20"


def test_group_of_one_unit_is_refused_in_the_mlp() -> None:
    keys = {"group_norm_groups": None, "group_norm_channels": 1}
    assert "a group needs >= 2 units" in message_of(config_of("mnist_mlp", "groupnorm", **keys), 28)


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
def test_group_norm_arms_of_table_4_have_the_groups_asked_for(groups: int) -> None:
    by_groups = build_model(config_of("cifar_resnet20", "groupnorm", group_norm_groups=groups), image_size_px=32)
    keys = {"group_norm_groups": None, "group_norm_channels": groups}
    by_channels = build_model(config_of("cifar_resnet20", "groupnorm", **keys), image_size_px=32)
    layers = [module for module in by_groups.modules() if isinstance(module, nn.GroupNorm)]
    assert len(layers) == 20 and {layer.num_groups for layer in layers} == {groups}
    layers = [module for module in by_channels.modules() if isinstance(module, nn.GroupNorm)]
    assert len(layers) == 20 and {layer.num_channels // layer.num_groups for layer in layers} == {groups}


def test_mnist_mlp_refuses_other_sizes_and_divisors_and_switches() -> None:
    assert message_of(config_of("mnist_mlp")) == "data.image_size_px: 32: mnist_mlp takes MNIST's 28"
    assert "whose n is 1; leave it null" in message_of(config_of("mnist_mlp", norm_divisor=4), 28)
    assert message_of(config_of("mnist_mlp", final_norm=True), 28).startswith("model.final_norm: mnist_mlp has no such")

"""From `ModelConfig` to a net: initialized, normalized as asked for, every norm divisor fixed."""

from collections.abc import Callable
from dataclasses import fields

import torch.distributed as dist
from torch import nn

from unitdist.config import ModelConfig
from unitdist.errors import ConfigError
from unitdist.layers import Unitization2d, compile_norms, set_norm_divisors
from unitdist.models.init import he_init
from unitdist.models.mlp import MnistMlp
from unitdist.models.nearest import did_you_mean
from unitdist.models.norm import image_norm_and_relu, vector_norm_and_relu
from unitdist.models.preact_resnet import BlockOptions
from unitdist.models.preact_resnet_cifar import cifar_resnet
from unitdist.models.preact_resnet_imagenet import imagenet_resnet
from unitdist.models.timm_bridge import PREFIX as TIMM_PREFIX
from unitdist.models.timm_bridge import build_timm_model

_MNIST_SIDE_PX = 28
_GRAYSCALE_NETS = ("mnist_mlp", "mnist_resnet8")
_RESNET_SWITCHES = (
    "stride_in_first_conv",
    "raw_projection",
    "stem_norm",
    "final_norm",
    "fold_residual",
    "overlap_sync",
)
_Build = Callable[[ModelConfig, dist.ProcessGroup | None, bool], nn.Module]


def build_model(
    config: ModelConfig, *, image_size_px: int, process_group: dist.ProcessGroup | None = None, sync: bool = True
) -> nn.Module:
    """The net that `config` describes, on torch's default device, in training mode.

    Weights are drawn from torch's global generator, which the caller seeds: the same draws for every
    `config.norm`. Norm divisors: `config.norm_divisor` in every Unitization2d layer, or else each layer's own H*W for
    images of `image_size_px`. Statistics are synchronized over `process_group` (None: the default group)
    unless `sync` is False. Returns a module: x_nchw -> logits (N, num_classes).
    Raises ConfigError: unknown name (with the nearest), groups that do not divide, a switch the net does not have.
    """
    is_timm = config.name.startswith(TIMM_PREFIX)
    if not is_timm and config.name not in _NETS:
        near = did_you_mean(config.name, MODEL_NAMES)
        raise ConfigError(
            f"model.name: unknown model {config.name!r}{near}; known: {', '.join(MODEL_NAMES)}, timm:NAME"
        )
    if is_timm or config.name == "mnist_mlp":
        _refuse_resnet_switches(config)
    if config.name == "mnist_mlp" and image_size_px != _MNIST_SIDE_PX:
        raise ConfigError(f"data.image_size_px: {image_size_px}: {config.name} takes MNIST's {_MNIST_SIDE_PX}")
    if is_timm:
        model = build_timm_model(config, process_group=process_group, sync=sync)
    else:
        model = _NETS[config.name](config, process_group, sync)
        he_init(model)
    has_images = any(isinstance(module, Unitization2d) for module in model.modules())
    if has_images and config.norm_divisor is None and config.norm_scope == "image":
        set_norm_divisors(model, image_size_px, channels=input_channels(config))
    return compile_norms(model) if config.compile_norm else model


def input_channels(config: ModelConfig) -> int:
    """Channels of the images that the net takes: 1 for the MNIST nets, 3 for all others."""
    return 1 if config.name in _GRAYSCALE_NETS else 3


def _build_cifar_resnet(depth: int, in_channels: int = 3) -> _Build:
    def build(config: ModelConfig, process_group: dist.ProcessGroup | None, sync: bool) -> nn.Module:
        return cifar_resnet(
            depth,
            _block_options(config, process_group, sync),
            num_classes=config.num_classes,
            in_channels=in_channels,
            stem_norm=True if config.stem_norm is None else config.stem_norm,
            final_norm=True if config.final_norm is None else config.final_norm,
        )

    return build


def _build_imagenet_resnet(depth: int) -> _Build:
    def build(config: ModelConfig, process_group: dist.ProcessGroup | None, sync: bool) -> nn.Module:
        return imagenet_resnet(
            depth,
            _block_options(config, process_group, sync),
            num_classes=config.num_classes,
            stem_norm=False if config.stem_norm is None else config.stem_norm,
            final_norm=False if config.final_norm is None else config.final_norm,
        )

    return build


def _build_mnist_mlp(config: ModelConfig, process_group: dist.ProcessGroup | None, sync: bool) -> nn.Module:
    norm_and_relu = vector_norm_and_relu(config, process_group=process_group, sync=sync)
    return MnistMlp(norm_and_relu, num_classes=config.num_classes)


def _block_options(config: ModelConfig, process_group: dist.ProcessGroup | None, sync: bool) -> BlockOptions:
    return BlockOptions(
        norm_and_relu=image_norm_and_relu(config, process_group=process_group, sync=sync),
        stride_in_first_conv=config.stride_in_first_conv,
        raw_projection=config.raw_projection,
        fold_residual=config.fold_residual,
        overlap_sync=config.overlap_sync,
    )


def _refuse_resnet_switches(config: ModelConfig) -> None:
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    for key in _RESNET_SWITCHES:
        if getattr(config, key) != defaults[key]:
            raise ConfigError(
                f"model.{key}: {config.name} has no such switch; it is for preact_resnet and cifar_resnet"
            )


_NETS: dict[str, _Build] = {
    **{f"preact_resnet{depth}": _build_imagenet_resnet(depth) for depth in (18, 34, 50, 101, 152)},
    **{f"cifar_resnet{depth}": _build_cifar_resnet(depth) for depth in (20, 110, 164)},
    "mnist_mlp": _build_mnist_mlp,
    "mnist_resnet8": _build_cifar_resnet(8, in_channels=1),
}
MODEL_NAMES = tuple(_NETS)
"""Every name that `model.name` can take, besides timm:NAME."""

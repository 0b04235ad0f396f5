"""timm's way of using unitdist: `import unitdist.timm`, then timm.create_model("preact_resnet101_unit", ...).

Importing this module registers preact_resnet{18,34,50,101,152}_unit and _bn with timm. Their parameter names are those of
unitdist's own nets, so checkpoints go both ways. For timm's own models: `convert_unitization(model)`, or one of
the two norm functions below as `norm_layer`.
"""

import warnings
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_act_layer, create_classifier, is_scriptable
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional

from unitdist.config import ModelConfig
from unitdist.errors import ConfigError
from unitdist.layers import Unitization2d, set_norm_divisors
from unitdist.layers.convert import UnitizationAct2d
from unitdist.models.init import he_init
from unitdist.models.norm import image_norm_and_relu
from unitdist.models.preact_resnet import BlockOptions, PreactResNet
from unitdist.models.preact_resnet_imagenet import imagenet_shape


def refuse_torchscript(scriptable: bool) -> None:
    """ConfigError if a model is asked for that torch.jit.script is to compile."""
    if scriptable:
        raise ConfigError(
            "TorchScript cannot compile Unitization or unitdist's nets: use torch.compile instead of scriptable=True "
            "(timm's scripts: --torchcompile instead of --torchscript)"
        )


def norm_layer(
    num_features: int,
    eps: float = 1e-5,
    momentum: float = 0.1,
    *,
    norm_divisor: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Unitization2d:
    """A plain norm for models that put an activation of their own behind it: create_model("resnet50", norm_layer=norm_layer).

    n stays open until `set_norm_divisors(model, image_size)` or the first training batch. Models that ask for norm and
    activation in one (DenseNet, RegNet, EfficientNet, ...) need `norm_act_layer`, or lose their activations.
    """
    refuse_torchscript(is_scriptable())
    return Unitization2d(num_features, eps, momentum, norm_divisor=norm_divisor, device=device, dtype=dtype)


def norm_act_layer(
    num_features: int,
    eps: float = 1e-5,
    momentum: float = 0.1,
    *,
    apply_act: bool = True,
    act_layer: str | type[nn.Module] | None = nn.ReLU,
    act_kwargs: dict[str, Any] | None = None,
    inplace: bool = True,
    drop_layer: type[nn.Module] | None = None,
    norm_divisor: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Unitization2d:
    """Norm and activation in one, with the arguments of timm's BatchNormAct2d, for models that ask for such.

    timm does not tell a function which activation the model wants: bind it where it is not ReLU,
    partial(norm_act_layer, act_layer="silu"). A plain ReLU is fused; another activation follows as a module.
    """
    refuse_torchscript(is_scriptable())
    act = (
        create_act_layer(act_layer, inplace=inplace, **(act_kwargs or {}))
        if apply_act and act_layer is not None
        else None
    )
    drop = None if drop_layer is None else drop_layer()
    if drop is None and (act is None or type(act) is nn.ReLU):
        return Unitization2d(
            num_features,
            eps,
            momentum,
            norm_divisor=norm_divisor,
            activation=None if act is None else "relu",
            device=device,
            dtype=dtype,
        )
    layer = UnitizationAct2d(num_features, eps, momentum, norm_divisor=norm_divisor, device=device, dtype=dtype)
    layer.drop, layer.act = drop or nn.Identity(), act or nn.Identity()
    return layer


class TimmPreactResNet(PreactResNet):
    """`PreactResNet` with the methods that timm calls. Same parameters, same names.

    `img_size`: side, or height and width, of the training images in px, which fixes the norm divisors, unless
    `fix_norm_divisors` is False: then the first training batch fixes them. `norm`, `norm_scope`, `stem_norm`,
    `final_norm`, `stride_in_first_conv`, `raw_projection`: as in ModelConfig.
    """

    def __init__(
        self,
        *,
        depth: int,
        norm: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        fix_norm_divisors: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_scope: str = "image",
        stem_norm: bool = False,
        final_norm: bool = False,
        stride_in_first_conv: bool = True,
        raw_projection: bool = True,
    ) -> None:
        refuse_torchscript(is_scriptable())
        config = ModelConfig(norm=norm, norm_scope=norm_scope)  # type: ignore[arg-type]
        options = BlockOptions(
            norm_and_relu=image_norm_and_relu(config, process_group=None, sync=True),
            stride_in_first_conv=stride_in_first_conv,
            raw_projection=raw_projection,
        )
        shape = imagenet_shape(depth)
        super().__init__(
            shape, options, num_classes=1, in_channels=in_chans, stem_norm=stem_norm, final_norm=final_norm
        )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.head_hidden_size = self.num_features
        channels = [shape.stem_channels, *(width * shape.block.expansion for width in shape.stage_widths)]
        modules = ["stem_relu", *(f"stages.{stage}" for stage in range(len(self.stages)))]
        self.feature_info = [
            {"num_chs": count, "reduction": 2 ** (index + 1), "module": module}
            for index, (count, module) in enumerate(zip(channels, modules, strict=True))
        ]
        self.pool, self.classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        he_init(self)
        self._built_for_hw: tuple[int, int] | None = None
        if norm == "unitization" and norm_scope == "image" and fix_norm_divisors:
            set_norm_divisors(self, img_size, channels=in_chans)
            self._built_for_hw = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])

    def forward_features(self, x_nchw: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the map that is pooled; warns where it trains on another size than it was built for."""
        if self.training and self._built_for_hw not in (None, tuple(x_nchw.shape[-2:])):
            _warn_of_image_size(self._built_for_hw, x_nchw)
        return super().forward_features(x_nchw)

    def forward_head(self, x_nchw: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features if `pre_logits`, else logits."""
        out: Tensor = functional.dropout(self.pool(x_nchw), p=self.drop_rate, training=self.training)
        return out if pre_logits else self.classifier(out)

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or nn.Identity."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, He-initialized; `num_classes` 0: none, the forward pass ends at the pooled features."""
        self.num_classes = num_classes
        weight = self.stem_conv.weight
        pool_type = self.pool.pool_type if global_pool is None else global_pool
        self.pool, classifier = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        he_init(classifier)
        self.classifier = classifier.to(device=weight.device, dtype=weight.dtype)

    def no_weight_decay(self) -> set[str]:
        """weight, bias and alpha of every norm, which timm's optimizers then leave without decay."""
        norms = (nn.modules.batchnorm._BatchNorm, Unitization2d)
        return {
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, norms)
            for parameter, _ in module.named_parameters(recurse=False)
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^final_norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of the stem (before its pool, index 0) and of the stages (1 to 4), and the pooled map's input.

        Stage outputs are the raw sums, not normalized; with `norm` the last one goes through the final norm (where the
        net has one) and ReLU. `indices`, `stop_early`, `intermediates_only`: as everywhere in timm.
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"output_fmt={output_fmt!r}: TimmPreactResNet has NCHW only")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        taken = []
        x = self.stem_relu(self.stem_norm(self.stem_conv(x)))
        if 0 in wanted:
            taken.append(x)
        x = self.stem_pool(x)
        for index, stage in enumerate(self.stages[:last] if stop_early else self.stages, start=1):
            x, residual = self.forward_stage(stage, x)
            x = x if residual is None else x + residual
            if index in wanted:
                is_final = index == len(self.feature_info) - 1
                taken.append(self.final_relu(self.final_norm(x)) if norm and is_final else x)
        if intermediates_only:
            return taken
        reached_end = not stop_early or last == len(self.stages)
        return (self.final_relu(self.final_norm(x)) if reached_end else x), taken

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the wanted intermediates do not need; returns their indices counted from the start."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[:last]
        if prune_norm:
            self.final_norm, self.final_relu = nn.Identity(), nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return list(wanted)


def _warn_of_image_size(built_for_hw: tuple[int, int] | None, x_nchw: Tensor) -> None:
    height, width = x_nchw.shape[-2:]
    wanted = f"img_size={width}" if height == width else f"img_size=({height},{width})"
    warnings.warn(
        f"the norm divisors are those of images of {built_for_hw} px, and this net trains on ({height}, {width}) px: unless "
        f"they were set since (set_norm_divisors, a checkpoint), pass {wanted} (timm's train.py: --model-kwargs {wanted})",
        stacklevel=3,
    )


default_cfgs = generate_default_cfgs(
    {
        f"preact_resnet{depth}_{arm}": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem_conv",
            "classifier": "classifier",
            "license": "apache-2.0",
        }
        for depth in (18, 34, 50, 101, 152)
        for arm in ("unit", "bn")
    }
)


def _create(variant: str, pretrained: bool, depth: int, norm: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's builder: cfg, pretrained weights if there were any, feature extraction. `arguments`: timm's and the net's."""
    model: nn.Module = build_model_with_cfg(
        TimmPreactResNet,
        variant,
        pretrained,
        feature_cfg={"feature_cls": "getter"},
        depth=depth,
        norm=norm,
        **arguments,
    )
    return model


def preact_resnet18_unit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-18 with Unitization."""
    return _create("preact_resnet18_unit", pretrained, 18, "unitization", kwargs)


def preact_resnet34_unit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-34 with Unitization."""
    return _create("preact_resnet34_unit", pretrained, 34, "unitization", kwargs)


def preact_resnet50_unit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-50 with Unitization."""
    return _create("preact_resnet50_unit", pretrained, 50, "unitization", kwargs)


def preact_resnet101_unit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-101 with Unitization, the paper's ImageNet net."""
    return _create("preact_resnet101_unit", pretrained, 101, "unitization", kwargs)


def preact_resnet152_unit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-152 with Unitization."""
    return _create("preact_resnet152_unit", pretrained, 152, "unitization", kwargs)


def preact_resnet18_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-18 with batch normalization."""
    return _create("preact_resnet18_bn", pretrained, 18, "batchnorm", kwargs)


def preact_resnet34_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-34 with batch normalization."""
    return _create("preact_resnet34_bn", pretrained, 34, "batchnorm", kwargs)


def preact_resnet50_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-50 with batch normalization."""
    return _create("preact_resnet50_bn", pretrained, 50, "batchnorm", kwargs)


def preact_resnet101_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-101 with batch normalization, the paper's baseline."""
    return _create("preact_resnet101_bn", pretrained, 101, "batchnorm", kwargs)


def preact_resnet152_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-152 with batch normalization."""
    return _create("preact_resnet152_bn", pretrained, 152, "batchnorm", kwargs)


for _entry_point in (
    preact_resnet18_unit,
    preact_resnet34_unit,
    preact_resnet50_unit,
    preact_resnet101_unit,
    preact_resnet152_unit,
    preact_resnet18_bn,
    preact_resnet34_bn,
    preact_resnet50_bn,
    preact_resnet101_bn,
    preact_resnet152_bn,
):
    register_model(_entry_point)

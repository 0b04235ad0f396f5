"""The network."""

from dataclasses import dataclass
from typing import Literal

from unitdist.config.checks import require
from unitdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its normalization."""

    name: str = "preact_resnet101"
    """preact_resnet{18,34,50,101,152} | cifar_resnet{20,110,164} | mnist_mlp | mnist_resnet8 | timm:NAME (converted)."""
    num_classes: int = 1000
    """Outputs of the classifier, >= 2."""
    norm: Literal["unitization", "batchnorm", "groupnorm"] = "unitization"
    """Normalization layer."""
    norm_divisor: int | None = None
    """Fixed norm divisor n of every Unitization layer (null: each layer's own H*W at data.image_size_px)."""
    norm_scope: Literal["image", "pixel"] = "image"
    """One norm per image (Alg. 2, Fig. 1c) or per pixel over channels (Fig. 1b)."""
    norm_eps: float = 1e-5
    """eps of the normalization, > 0."""
    norm_momentum: float = 0.1
    """Momentum of the running statistics, PyTorch's convention, in (0, 1]."""
    group_norm_groups: int | None = None
    """groupnorm: number of groups (give this or group_norm_channels)."""
    group_norm_channels: int | None = None
    """groupnorm: channels per group (give this or group_norm_groups)."""
    sync_group: Literal["world", "node", "none"] = "world"
    """Ranks over which batch statistics are synchronized."""
    stats_batch_size: int | None = None
    """Images per batch statistic; sets the size of the sync groups and replaces sync_group (paper: 64)."""
    stride_in_first_conv: bool = True
    """Bottleneck blocks: stride in the first 1x1 convolution (paper) instead of in the 3x3."""
    raw_projection: bool = True
    """Projection shortcuts read the block's raw input (paper) instead of the pre-activated one."""
    stem_norm: bool | None = None
    """Norm and ReLU right after the stem convolution (null: CIFAR yes, ImageNet no)."""
    final_norm: bool | None = None
    """Norm after the last block (null: CIFAR yes, ImageNet no, as in the paper)."""
    fold_residual: bool = False
    """unitization: a block's first norm adds shortcut and branch while it takes its moments. The same gradients."""
    overlap_sync: bool = False
    """unitization: norm and convolution as one node, which hides the backward collective. The same gradients."""
    compile_norm: bool = False
    """unitization: the layers run as torch.compile's pieces (needs a compiler; on CUDA Triton kernels are the default)."""
    init_from: str | None = None
    """File of weights to start from: ours, timm's or torchvision's, .pt, .pth or .safetensors (null: random weights)."""
    init_head: bool = True
    """init_from: take the classifier too; false: start it anew, for a data set with other classes."""

    def __post_init__(self) -> None:
        require(self.num_classes >= 2, "model.num_classes", ">= 2", self.num_classes)
        require(
            self.norm_divisor is None or self.norm_divisor >= 1, "model.norm_divisor", ">= 1 or null", self.norm_divisor
        )
        require(self.norm_eps > 0, "model.norm_eps", "> 0", self.norm_eps)
        require(0 < self.norm_momentum <= 1, "model.norm_momentum", "in (0, 1]", self.norm_momentum)
        for key in ("group_norm_groups", "group_norm_channels", "stats_batch_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"model.{key}", ">= 1 or null", value)
        for key in ("fold_residual", "overlap_sync", "compile_norm"):
            require(
                self.norm == "unitization" or not getattr(self, key),
                f"model.{key}",
                "false for another norm than unitization",
                True,
            )
        require(
            self.init_head or self.init_from is not None,
            "model.init_head",
            "true where model.init_from is not given",
            False,
        )
        given = (self.group_norm_groups is not None) + (self.group_norm_channels is not None)
        if self.norm == "groupnorm" and given != 1:
            raise ConfigError(
                "model.norm: groupnorm needs exactly one of model.group_norm_groups and model.group_norm_channels"
            )
        if self.norm != "groupnorm" and given:
            raise ConfigError(
                f"model.group_norm_groups and model.group_norm_channels are for norm: groupnorm, not {self.norm}"
            )

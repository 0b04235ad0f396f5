"""Full pre-activation ResNets: the blocks and the net that the CIFAR, MNIST and ImageNet variants share.

A block is a chain of norm, ReLU, convolution; its sum with the shortcut goes on raw, to the next block's
own norm. Shortcuts are never normalized. Axes: n samples, c channels, h rows, w columns.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, TypeAlias, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unitdist.layers import Unitization2d, normalize_and_convolve
from unitdist.models.norm import NormAndRelu


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What all blocks of a net share; the defaults are the paper's."""

    norm_and_relu: NormAndRelu
    stride_in_first_conv: bool = True
    """Bottleneck: stride in the first 1x1 convolution (True) or in the 3x3."""
    raw_projection: bool = True
    """The projection shortcut reads the block's raw input (True) or the pre-activated one."""
    fold_residual: bool = False
    """Unitization: the next block's first norm adds shortcut and branch while it takes its moments. Same gradients."""
    overlap_sync: bool = False
    """Unitization: norm and convolution as one autograd node, which hides the backward collective. Same gradients."""


Block: TypeAlias = "type[BasicBlock] | type[BottleneckBlock]"


@dataclass(frozen=True, kw_only=True)
class NetShape:
    """Sizes of a net. Stages after the first halve the map."""

    stem_channels: int
    stem_kernel: int
    stem_stride: int
    stem_pool: bool
    """A 3x3 max pool of stride 2 after the stem."""
    block: "Block"
    stage_blocks: tuple[int, ...]
    stage_widths: tuple[int, ...]
    """Channels of the blocks' 3x3 convolutions; a bottleneck stage puts out 4 times as many."""


class PreactBlock(nn.Module):
    """How a block begins and ends; BasicBlock and BottleneckBlock say what is between.

    A block takes its input as x, or as the two terms of the sum x + residual, and puts out a sum, or with
    `fold_residual` its two terms, so that the next block's norm can add them in the pass that reads them.
    """

    norm1: nn.Module
    relu1: nn.Module
    conv1: nn.Conv2d
    projection: nn.Conv2d | None

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        self.raw_projection = options.raw_projection
        self.fold_residual = options.fold_residual
        self.overlap_sync = options.overlap_sync

    def begin(self, x_nchw: Tensor, residual_nchw: Tensor | None) -> tuple[Tensor, Tensor]:
        """(first convolution's output, shortcut) of the block's input x + residual."""
        if (
            self.overlap_sync
            and isinstance(self.norm1, Unitization2d)
            and (self.raw_projection or self.projection is None)
        ):
            result = normalize_and_convolve(self.norm1, self.conv1, x_nchw, residual_nchw)
            out, x_nchw = result if isinstance(result, tuple) else (result, x_nchw)
            return out, x_nchw if self.projection is None else self.projection(x_nchw)
        active, x_nchw = normalize_sum(self.norm1, x_nchw, residual_nchw)
        active = self.relu1(active)
        shortcut = x_nchw
        if self.projection is not None:
            shortcut = self.projection(x_nchw if self.raw_projection else active)
        return self.conv1(active), shortcut

    def go_on(self, norm: nn.Module, relu: nn.Module, conv: nn.Conv2d, x_nchw: Tensor) -> Tensor:
        """conv(relu(norm(x)))."""
        if self.overlap_sync and isinstance(norm, Unitization2d):
            return cast("Tensor", normalize_and_convolve(norm, conv, x_nchw))
        out: Tensor = conv(relu(norm(x_nchw)))
        return out

    def end(self, out_nchw: Tensor, shortcut_nchw: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The block's output: the sum, or its two terms."""
        return (out_nchw, shortcut_nchw) if self.fold_residual else out_nchw + shortcut_nchw


class BasicBlock(PreactBlock):
    """x + conv3x3(relu(norm(conv3x3/stride(relu(norm(x)))))), with a 1x1 projection of x where the shape changes."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, width: int, stride: int, options: BlockOptions) -> None:
        super().__init__(options)
        self.norm1, self.relu1 = options.norm_and_relu(in_channels)
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.norm2, self.relu2 = options.norm_and_relu(width)
        self.conv2 = _conv(width, width, 3)
        self.projection = _projection(in_channels, width, stride)

    def forward(self, x_nchw: Tensor, residual_nchw: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(N, in_channels, H, W) -> (N, width, H/stride, W/stride), rounded up, or two such that are to be added."""
        out, shortcut = self.begin(x_nchw, residual_nchw)
        out = self.go_on(self.norm2, self.relu2, self.conv2, out)
        return self.end(out, shortcut)


class BottleneckBlock(PreactBlock):
    """x + conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(relu(norm(x))))))))), four times `width` channels out."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, width: int, stride: int, options: BlockOptions) -> None:
        super().__init__(options)
        first_stride, second_stride = (stride, 1) if options.stride_in_first_conv else (1, stride)
        self.norm1, self.relu1 = options.norm_and_relu(in_channels)
        self.conv1 = _conv(in_channels, width, 1, first_stride)
        self.norm2, self.relu2 = options.norm_and_relu(width)
        self.conv2 = _conv(width, width, 3, second_stride)
        self.norm3, self.relu3 = options.norm_and_relu(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.projection = _projection(in_channels, width * self.expansion, stride)

    def forward(self, x_nchw: Tensor, residual_nchw: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(N, in_channels, H, W) -> (N, 4 width, H/stride, W/stride), rounded up, or two such that are to be added."""
        out, shortcut = self.begin(x_nchw, residual_nchw)
        out = self.go_on(self.norm2, self.relu2, self.conv2, out)
        out = self.go_on(self.norm3, self.relu3, self.conv3, out)
        return self.end(out, shortcut)


def normalize_sum(norm: nn.Module, x_nchw: Tensor, residual_nchw: Tensor | None) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual); Unitization2d adds in the pass in which it takes its moments."""
    if residual_nchw is not None and isinstance(norm, Unitization2d):
        return norm(x_nchw, residual_nchw)  # type: ignore[no-any-return]
    total = x_nchw if residual_nchw is None else x_nchw + residual_nchw
    return norm(total), total


class PreactResNet(nn.Module):
    """Stem, stages of blocks, (norm,) ReLU, global average pool, linear classifier.

    x_nchw (N, in_channels, H, W), any H and W -> logits (N, num_classes). Module names, in the order of the data:
    stem_conv, stem_norm, stem_relu, stem_pool, stages.<i>.<j>.{norm,relu,conv}<k>, final_norm, final_relu, pool,
    classifier; what a net does not have is an nn.Identity. Without `stem_norm` there is no ReLU after the stem
    either; without `final_norm` the ReLU before the pool stays.
    """

    def __init__(
        self,
        shape: NetShape,
        options: BlockOptions,
        *,
        num_classes: int,
        in_channels: int = 3,
        stem_norm: bool,
        final_norm: bool,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem_conv = _conv(in_channels, shape.stem_channels, shape.stem_kernel, shape.stem_stride)
        self.stem_norm, self.stem_relu = (
            options.norm_and_relu(shape.stem_channels) if stem_norm else (nn.Identity(), nn.Identity())
        )
        self.stem_pool = nn.MaxPool2d(3, stride=2, padding=1) if shape.stem_pool else nn.Identity()
        stage_channels = (shape.stem_channels, *(width * shape.block.expansion for width in shape.stage_widths))
        self.stages = nn.ModuleList(
            _stage(shape.block, count, before, width, 1 if index == 0 else 2, options)
            for index, (count, width, (before, _)) in enumerate(
                zip(shape.stage_blocks, shape.stage_widths, pairwise(stage_channels), strict=True)
            )
        )
        self.num_features = stage_channels[-1]
        self.final_norm, self.final_relu = (
            options.norm_and_relu(self.num_features) if final_norm else (nn.Identity(), nn.ReLU())
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(self.num_features, num_classes)
        self.grad_checkpointing = False

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x_nchw))

    def forward_features(self, x_nchw: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> the map that is pooled, after the last ReLU."""
        x_nchw = self.forward_stem(x_nchw)
        residual: Tensor | None = None
        for stage in self.stages:
            x_nchw, residual = self.forward_stage(stage, x_nchw, residual)
        x_nchw = self.final_relu(normalize_sum(self.final_norm, x_nchw, residual)[0])
        return x_nchw

    def forward_stem(self, x_nchw: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> the first stage's input."""
        x_nchw = self.stem_pool(self.stem_relu(self.stem_norm(self.stem_conv(x_nchw))))
        return x_nchw

    def forward_stage(
        self, stage: nn.Module, x_nchw: Tensor, residual_nchw: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One stage: x + residual in, and out; the second is None unless the blocks put out two terms.

        With gradient checkpointing the blocks' activations are computed again in the backward pass.
        """
        for block in stage.children():
            if self.grad_checkpointing and self.training:
                contexts = partial(_recompute_contexts, block)
                out = checkpoint(block, x_nchw, residual_nchw, use_reentrant=False, context_fn=contexts)
            else:
                out = block(x_nchw, residual_nchw)
            x_nchw, residual_nchw = out if isinstance(out, tuple) else (out, None)
        return x_nchw, residual_nchw

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs in training and compute the rest twice; running statistics move once."""
        self.grad_checkpointing = enable

    def forward_head(self, x_nchw: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled map (N, num_features) if `pre_logits`, else logits (N, num_classes)."""
        out_nc: Tensor = self.pool(x_nchw).flatten(1)
        return out_nc if pre_logits else self.classifier(out_nc)


def _recompute_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of `torch.utils.checkpoint`: of the first pass, and of the pass that computes it again."""
    return nullcontext(), _spared_buffers(block)


@contextmanager
def _spared_buffers(block: nn.Module) -> Iterator[None]:
    """Let the block work on copies of its buffers, or its running statistics would move twice per step."""
    kept = [(module, dict(module._buffers)) for module in block.modules()]
    for module, buffers in kept:
        module._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


def _stage(
    block: Block,
    count: int,
    in_channels: int,
    width: int,
    stride: int,
    options: BlockOptions,
) -> nn.Sequential:
    first = block(in_channels, width, stride, options)
    others = (block(width * block.expansion, width, 1, options) for _ in range(count - 1))
    return nn.Sequential(first, *others)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """No bias: a norm follows, or the sum of a block, whose channels' means the next norm takes away."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d | None:
    return _conv(in_channels, out_channels, 1, stride) if stride != 1 or in_channels != out_channels else None

"""The ImageNet nets of Table 3: full pre-activation ResNet-18, 34, 50, 101 and 152.

7x7/2 stem of 64 and 3x3/2 max pool, neither normalized; four stages; the outputs of shortcuts and of the last
block are not normalized, the ReLU before the pool stays; global average pool, linear.
"""

from unitdist.models.preact_resnet import BasicBlock, Block, BlockOptions, BottleneckBlock, NetShape, PreactResNet

_STAGES: dict[int, tuple[Block, tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
    152: (BottleneckBlock, (3, 8, 36, 3)),
}
DEPTHS = tuple(_STAGES)


def imagenet_resnet(
    depth: int,
    options: BlockOptions,
    *,
    num_classes: int,
    in_channels: int = 3,
    stem_norm: bool = False,
    final_norm: bool = False,
) -> PreactResNet:
    """The net of that depth. At 224 x 224 the stages see maps of 56^2, 28^2, 14^2 and 7^2 pixels."""
    return PreactResNet(
        imagenet_shape(depth),
        options,
        num_classes=num_classes,
        in_channels=in_channels,
        stem_norm=stem_norm,
        final_norm=final_norm,
    )


def imagenet_shape(depth: int) -> NetShape:
    """Stem, blocks and widths of the net of that depth. Raises ValueError for another depth than `DEPTHS`."""
    if depth not in _STAGES:
        raise ValueError(f"no ImageNet ResNet of depth {depth}; known: {DEPTHS}")
    block, blocks = _STAGES[depth]
    return NetShape(
        stem_channels=64,
        stem_kernel=7,
        stem_stride=2,
        stem_pool=True,
        block=block,
        stage_blocks=blocks,
        stage_widths=(64, 128, 256, 512),
    )

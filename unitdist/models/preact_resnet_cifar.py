"""The paper's CIFAR nets, and the small one of the same shape for MNIST (Tables 1, 2 and 4, Fig. 3).

3x3 stem of 16, norm, ReLU; three stages of 16, 32 and 64; final norm, ReLU, global average pool, linear.
"""

from unitdist.models.preact_resnet import BasicBlock, Block, BlockOptions, BottleneckBlock, NetShape, PreactResNet

_BASIC_DEPTHS = (8, 20, 110)
_BOTTLENECK_DEPTHS = (164,)


def cifar_resnet(
    depth: int,
    options: BlockOptions,
    *,
    num_classes: int,
    in_channels: int = 3,
    stem_norm: bool = True,
    final_norm: bool = True,
) -> PreactResNet:
    """ResNet-20 and -110 of basic blocks (6n+2 layers), ResNet-164 of bottlenecks (9n+2); 8 is the MNIST net.

    At 32 x 32 the stages see maps of 32^2, 16^2 and 8^2 pixels.
    """
    block: Block
    if depth in _BASIC_DEPTHS:
        block, blocks = BasicBlock, (depth - 2) // 6
    elif depth in _BOTTLENECK_DEPTHS:
        block, blocks = BottleneckBlock, (depth - 2) // 9
    else:
        raise ValueError(f"no CIFAR ResNet of depth {depth}; known: {_BASIC_DEPTHS + _BOTTLENECK_DEPTHS}")
    shape = NetShape(
        stem_channels=16,
        stem_kernel=3,
        stem_stride=1,
        stem_pool=False,
        block=block,
        stage_blocks=(blocks,) * 3,
        stage_widths=(16, 32, 64),
    )
    return PreactResNet(
        shape, options, num_classes=num_classes, in_channels=in_channels, stem_norm=stem_norm, final_norm=final_norm
    )

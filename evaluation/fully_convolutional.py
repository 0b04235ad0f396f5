"""Batches for images of many shapes, without a single padded pixel.

Convolutions see padding, and the per-image norm of Unitization sees it too: a padded image is another image. So images are
batched only with images of exactly their own shape, and a batch is bounded by its number of pixels.
"""

from collections.abc import Sequence

from torch import nn

from unitdist.errors import ConfigError

Shape = tuple[int, int]


def group_by_shape(shapes: Sequence[Shape], pixels_per_batch: int) -> list[list[int]]:
    """Positions of `shapes` (height, width) in batches of one exact shape, each of at most `pixels_per_batch` pixels.

    An image larger than the budget goes alone. Shapes in order of first appearance, positions increasing: the grouping
    depends on nothing but its arguments. Every position comes exactly once.
    """
    positions_of: dict[Shape, list[int]] = {}
    for position, shape in enumerate(shapes):
        positions_of.setdefault(shape, []).append(position)
    batches = []
    for (height, width), positions in positions_of.items():
        images = max(1, pixels_per_batch // (height * width))
        batches += [positions[start : start + images] for start in range(0, len(positions), images)]
    return batches


def order_by_shape(shapes: Sequence[Shape]) -> list[int]:
    """Positions sorted by (height, width, position): neighbours then share a shape as often as possible.

    The resized shapes at every scale follow from the original one, so one order serves all scales.
    """
    return sorted(range(len(shapes)), key=lambda position: (*shapes[position], position))


def require_dense_classifier(model: nn.Module) -> None:
    """Raise ConfigError unless the classifier can be applied at every position of a map of any size.

    Global average pooling followed by a linear layer equals the linear layer applied at every position and averaged,
    because both are linear. A pool onto a grid larger than 1x1 ties the classifier to one place, and a network
    without any pool to one image size.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            size = module.output_size
            sides = set(size) if isinstance(size, tuple) else {size}
            if sides != {1}:
                raise ConfigError(
                    f"the fully-convolutional protocol needs a global pool before the classifier, but {name} pools onto "
                    f"{size}; use --protocol crops for this network"
                )

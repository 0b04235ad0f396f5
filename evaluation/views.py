"""Which pixels of an image the network sees: resized sizes, crop positions, and the 42 views of Table 3.

Pure integer geometry, no images and no tensors: every decoder and every test takes its numbers from here. An image
is first resized so that its shorter side is `scale_px`; a view is then a square window of the resized image, or its
mirror image (left and right exchanged). Nothing is ever padded, so a scale is never smaller than the crop.
"""

from dataclasses import dataclass
from typing import Literal

from unitdist.errors import ConfigError

TABLE_3_SCALES_PX = (224, 256, 384, 480, 640)
"""Shorter sides of both multi-scale protocols in the paper."""

WINDOWS_OF_COUNT = {1: 1, 2: 1, 5: 5, 10: 5}
"""Views per scale -> windows cut: 1 centre; 2 centre + mirror; 5 corners + centre; 10 those + mirrors."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One scale of one protocol: what is computed, stored and resumed as a whole.

    `kind` crops: square windows of the resized image; whole: the resized image itself. `views` counts mirror images.
    """

    kind: Literal["crops", "whole"]
    scale_px: int
    views: int

    @property
    def name(self) -> str:
        """Unique among all passes and fit for a file name."""
        return f"{self.kind}_{self.scale_px}px_{self.views}views"

    @property
    def mirrored(self) -> bool:
        """Whether each window is seen mirrored as well."""
        return self.views % 2 == 0


@dataclass(frozen=True, kw_only=True)
class View:
    """One view of one image: resize to (resized_height, resized_width), cut at (top, left), then mirror."""

    scale_px: int
    resized_height: int
    resized_width: int
    top: int
    left: int
    mirrored: bool


def resized_size(height: int, width: int, shorter_px: int) -> tuple[int, int]:
    """(height, width) after resizing the shorter side to `shorter_px`; the longer one is truncated, as torchvision does.

    The result is never smaller than `shorter_px` on either side, whatever the input's size.
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"an image of {height}x{width} pixels has no size to resize to")
    longer_px = int(shorter_px * max(height, width) / min(height, width))
    return (shorter_px, longer_px) if height <= width else (longer_px, shorter_px)


def centre_offset(size_px: int, crop_px: int) -> int:
    """First pixel of the centre crop: half of what is left over, halves rounded to the even number, as torchvision does."""
    return round((size_px - crop_px) / 2)


def crop_offsets(height: int, width: int, crop_px: int, windows: int) -> tuple[tuple[int, int], ...]:
    """(top, left) of the windows of a resized image: 1 is the centre; 5 are the corners (top left, top right, bottom left,
    bottom right), then the centre, in torchvision's order."""
    centre = (centre_offset(height, crop_px), centre_offset(width, crop_px))
    if windows == 1:
        return (centre,)
    bottom, right = height - crop_px, width - crop_px
    return ((0, 0), (0, right), (bottom, 0), (bottom, right), centre)


def pass_views(plan: Pass, height: int, width: int, crop_px: int) -> tuple[View, ...]:
    """The views of a crops pass on a height x width image: all windows first, then their mirrors in the same order."""
    resized_height, resized_width = resized_size(height, width, plan.scale_px)
    offsets = crop_offsets(resized_height, resized_width, crop_px, WINDOWS_OF_COUNT[plan.views])
    return tuple(
        View(
            scale_px=plan.scale_px,
            resized_height=resized_height,
            resized_width=resized_width,
            top=top,
            left=left,
            mirrored=mirrored,
        )
        for mirrored in ((False, True) if plan.mirrored else (False,))
        for top, left in offsets
    )


def multi_scale_views(
    height: int, width: int, scales_px: tuple[int, ...] = TABLE_3_SCALES_PX, crop_px: int = 224
) -> tuple[View, ...]:
    """All views of the multi-scale protocol on a height x width image; 2 + 4 x 10 = 42 with the defaults."""
    plans = crops_passes(scales_px, crop_px)
    return tuple(view for plan in plans for view in pass_views(plan, height, width, crop_px))


def crops_passes(
    scales_px: tuple[int, ...] = TABLE_3_SCALES_PX, crop_px: int = 224, views_per_scale: tuple[int, ...] | None = None
) -> tuple[Pass, ...]:
    """The passes of the multi-scale crop protocol, smallest scale first.

    `views_per_scale` None: 2 views where the scale is the crop itself (its corners would nearly coincide), else 10.
    Raises ConfigError for a scale below the crop, or for a number of views that is not 1, 2, 5 or 10.
    """
    if views_per_scale is None:
        views_per_scale = tuple(2 if scale_px == crop_px else 10 for scale_px in scales_px)
    if len(views_per_scale) != len(scales_px):
        raise ConfigError(f"crops per scale: {len(views_per_scale)} counts were given for {len(scales_px)} scales")
    for scale_px, views in zip(scales_px, views_per_scale, strict=True):
        if views not in WINDOWS_OF_COUNT:
            raise ConfigError(f"crops per scale: {views} at scale {scale_px}; allowed are 1, 2, 5 and 10")
        if scale_px < crop_px:
            raise ConfigError(f"scale {scale_px} is smaller than the crop of {crop_px} pixels, and images are never padded")
    if list(scales_px) != sorted(set(scales_px)) or not scales_px:
        raise ConfigError(f"scales must be increasing, each once, got {list(scales_px)}")
    return tuple(
        Pass(kind="crops", scale_px=scale_px, views=views)
        for scale_px, views in zip(scales_px, views_per_scale, strict=True)
    )


def whole_passes(scales_px: tuple[int, ...] = TABLE_3_SCALES_PX, mirror: bool = True) -> tuple[Pass, ...]:
    """The passes of the fully-convolutional protocol: the whole image at each scale, and its mirror if asked for."""
    if list(scales_px) != sorted(set(scales_px)) or not scales_px or scales_px[0] < 1:
        raise ConfigError(f"scales must be increasing, each once, at least 1, got {list(scales_px)}")
    return tuple(Pass(kind="whole", scale_px=scale_px, views=2 if mirror else 1) for scale_px in scales_px)

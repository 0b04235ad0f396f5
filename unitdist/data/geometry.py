"""Which part of an image becomes the network's input: one arithmetic for every loader.

All numbers are whole pixels computed here from the image's size and our own draws, so that DALI and torchvision cut
the same window. Axes: _hw is (N, 2) int64 height, width; _yx is (N, 2) row, column; N samples.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unitdist.config import DataConfig
from unitdist.data import draws
from unitdist.data.draws import Ints

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ResizeThenCrop:
    """Resize the whole image to resized_hw, cut a square at offset_yx, mirror where flip (N,)."""

    resized_hw: Ints
    offset_yx: Ints
    flip: Bools


@dataclass(frozen=True, kw_only=True)
class CropThenResize:
    """Cut box_hw at corner_yx from the image, resize it to the square, mirror where flip (N,)."""

    corner_yx: Ints
    box_hw: Ints
    flip: Bools


Geometry = ResizeThenCrop | CropThenResize


@dataclass(frozen=True, kw_only=True)
class Region:
    """The same window for a decoder of regions: decode shape_hw at start_yx, then resample roi to the square.

    roi_start_yx and roi_end_yx, (N, 2) float32, are in pixels of the decoded region. For ResizeThenCrop the region
    is wider than the window, so that the resampling kernel finds the pixels it would see in the whole image.
    """

    start_yx: Ints
    shape_hw: Ints
    roi_start_yx: npt.NDArray[np.float32]
    roi_end_yx: npt.NDArray[np.float32]
    flip: Bools


@dataclass(frozen=True, kw_only=True)
class CornerRegion:
    """The same window for a resize that has no fractional window: decode shape_hw at start_yx, mirror the axes in
    mirror_yx, resize by scale_hw (output by source pixels) to grid_hw, cut a square at first_yx, mirror the axes in back_yx.

    For ResizeThenCrop the region begins at the image's corner that is nearest to the window, where the grids of source and
    output pixels meet; a far corner becomes the first one by mirroring. scale_hw: (N, 2) float64. mirror_yx, back_yx: (N, 2).
    """

    start_yx: Ints
    shape_hw: Ints
    mirror_yx: Bools
    scale_hw: npt.NDArray[np.float64]
    grid_hw: Ints
    first_yx: Ints
    back_yx: Bools


def resized_size(size_hw: Ints, shorter_px: Ints) -> Ints:
    """(N, 2): the shorter side becomes shorter_px (N,), the longer one floor(shorter_px * long / short).

    The floor is torchvision's and the reference for all: DALI alone would round.
    """
    short = size_hw.min(axis=1)
    resized_hw: Ints = shorter_px[:, None] * size_hw // short[:, None]
    return resized_hw


def scale_augmentation(
    size_hw: Ints,
    side_px: int,
    *,
    seed: int,
    epoch: int,
    sample_ids: Ints,
    scale_range_px: tuple[int, int],
    flip_probability: float,
) -> ResizeThenCrop:
    """The paper's augmentation: shorter side uniform in the closed integer range, square anywhere, random mirror."""
    low, high = scale_range_px
    shorter_px = low + draws.integer(seed, epoch, sample_ids, draws.SCALE, high - low + 1)
    resized_hw = resized_size(size_hw, shorter_px)
    y = draws.integer(seed, epoch, sample_ids, draws.CROP_Y, resized_hw[:, 0] - side_px + 1)
    x = draws.integer(seed, epoch, sample_ids, draws.CROP_X, resized_hw[:, 1] - side_px + 1)
    flip = draws.uniform(seed, epoch, sample_ids, draws.FLIP) < flip_probability
    return ResizeThenCrop(resized_hw=resized_hw, offset_yx=np.stack([y, x], axis=1), flip=flip)


def random_resized_crop(
    size_hw: Ints,
    *,
    seed: int,
    epoch: int,
    sample_ids: Ints,
    area_range: tuple[float, float],
    aspect_range: tuple[float, float],
    flip_probability: float,
    attempts: int = 10,
) -> CropThenResize:
    """torchvision's RandomResizedCrop: up to ten draws of area and log aspect ratio, else the largest centre box."""
    height, width = size_hw[:, 0], size_hw[:, 1]
    log_low, log_high = np.log(aspect_range[0]), np.log(aspect_range[1])
    box_hw = _central_box(size_hw, aspect_range)
    corner_yx = (size_hw - box_hw) // 2
    open_rows = np.ones(len(size_hw), dtype=np.bool_)
    for attempt in range(attempts):
        area_u = draws.uniform(seed, epoch, sample_ids, draws.AREA + attempt)
        aspect_u = draws.uniform(seed, epoch, sample_ids, draws.ASPECT + attempt)
        area = height * width * (area_range[0] + (area_range[1] - area_range[0]) * area_u)
        aspect = np.exp(log_low + (log_high - log_low) * aspect_u)
        tried_w, tried_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = open_rows & (tried_w > 0) & (tried_w <= width) & (tried_h > 0) & (tried_h <= height)
        box_hw[fits] = np.stack([tried_h, tried_w], axis=1)[fits].astype(np.int64)
        open_rows &= ~fits
        if not open_rows.any():
            break
    y = draws.integer(seed, epoch, sample_ids, draws.CROP_Y, height - box_hw[:, 0] + 1)
    x = draws.integer(seed, epoch, sample_ids, draws.CROP_X, width - box_hw[:, 1] + 1)
    corner_yx = np.where(open_rows[:, None], corner_yx, np.stack([y, x], axis=1))
    flip = draws.uniform(seed, epoch, sample_ids, draws.FLIP) < flip_probability
    return CropThenResize(corner_yx=corner_yx, box_hw=box_hw, flip=flip)


def _central_box(size_hw: Ints, aspect_range: tuple[float, float]) -> Ints:
    """torchvision's fallback: the whole image, or its largest box with the nearest allowed aspect ratio."""
    height, width = size_hw[:, 0], size_hw[:, 1]
    aspect = width / height
    box_h = np.where(aspect < aspect_range[0], np.rint(width / aspect_range[0]), height)
    box_w = np.where(aspect > aspect_range[1], np.rint(height * aspect_range[1]), width)
    return np.stack([box_h, box_w], axis=1).astype(np.int64)


def centre_crop(size_hw: Ints, shorter_px: int, side_px: int) -> ResizeThenCrop:
    """Validation: resize the shorter side, cut the centre square. Half pixels go to the even side, as in Python."""
    resized_hw = resized_size(size_hw, np.full(len(size_hw), shorter_px, dtype=np.int64))
    offset_yx = np.rint((resized_hw - side_px) / 2).astype(np.int64)
    return ResizeThenCrop(resized_hw=resized_hw, offset_yx=offset_yx, flip=np.zeros(len(size_hw), dtype=np.bool_))


def training_geometry(config: DataConfig, *, seed: int, epoch: int, sample_ids: Ints, size_hw: Ints) -> Geometry:
    """The windows that data.augmentation asks for."""
    if config.augmentation == "none":
        return validation_geometry(config, size_hw=size_hw)
    draw: dict[str, Any] = {"seed": seed, "epoch": epoch, "sample_ids": sample_ids}
    if config.augmentation == "scale":
        return scale_augmentation(
            size_hw,
            config.image_size_px,
            scale_range_px=config.scale_range_px,
            flip_probability=config.flip_probability,
            **draw,
        )
    assert config.augmentation == "random_resized_crop", config.augmentation
    return random_resized_crop(
        size_hw,
        area_range=config.area_range,
        aspect_range=config.aspect_range,
        flip_probability=config.flip_probability,
        **draw,
    )


def validation_geometry(config: DataConfig, *, size_hw: Ints) -> Geometry:
    """The window of single-crop validation."""
    return centre_crop(size_hw, config.val_resize_px, config.image_size_px)


def decode_region(geometry: Geometry, size_hw: Ints, side_px: int) -> Region:
    """Rewrite a geometry for a decoder of regions."""
    if isinstance(geometry, CropThenResize):
        return Region(
            start_yx=geometry.corner_yx,
            shape_hw=geometry.box_hw,
            roi_start_yx=np.zeros(size_hw.shape, dtype=np.float32),
            roi_end_yx=geometry.box_hw.astype(np.float32),
            flip=geometry.flip,
        )
    source_px_per_px = size_hw / geometry.resized_hw
    start = geometry.offset_yx * source_px_per_px
    end = (geometry.offset_yx + side_px) * source_px_per_px
    margin = _kernel_margin(source_px_per_px)
    first = np.maximum(np.floor(start - margin), 0)
    last = np.minimum(np.ceil(end + margin), size_hw)
    return Region(
        start_yx=first.astype(np.int64),
        shape_hw=(last - first).astype(np.int64),
        roi_start_yx=(start - first).astype(np.float32),
        roi_end_yx=(end - first).astype(np.float32),
        flip=geometry.flip,
    )


def corner_region(geometry: Geometry, size_hw: Ints, side_px: int) -> CornerRegion:
    """Rewrite a geometry for a decoder of regions and a resize that starts at a corner."""
    if isinstance(geometry, CropThenResize):
        untouched = np.zeros(size_hw.shape, dtype=np.bool_)
        return CornerRegion(
            start_yx=geometry.corner_yx,
            shape_hw=geometry.box_hw,
            mirror_yx=untouched,
            scale_hw=side_px / geometry.box_hw,
            grid_hw=np.full(size_hw.shape, side_px, dtype=np.int64),
            first_yx=np.zeros(size_hw.shape, dtype=np.int64),
            back_yx=_with_flip(untouched, geometry.flip),
        )
    free_hw = geometry.resized_hw - side_px
    mirror_yx = 2 * geometry.offset_yx > free_hw
    first_yx = np.where(mirror_yx, free_hw - geometry.offset_yx, geometry.offset_yx)
    source_px_per_px = size_hw / geometry.resized_hw
    end = (first_yx + side_px) * source_px_per_px + _kernel_margin(source_px_per_px)
    shape_hw = np.minimum(np.ceil(end), size_hw).astype(np.int64)
    grid_hw = first_yx + side_px
    return CornerRegion(
        start_yx=np.where(mirror_yx, size_hw - shape_hw, 0),
        shape_hw=shape_hw,
        mirror_yx=mirror_yx,
        scale_hw=geometry.resized_hw / size_hw,
        # torch takes an axis whose size stays as one that is not resized at all.
        grid_hw=np.where(grid_hw == shape_hw, grid_hw + 1, grid_hw),
        first_yx=first_yx,
        back_yx=_with_flip(mirror_yx, geometry.flip),
    )


def _with_flip(mirror_yx: Bools, flip: Bools) -> Bools:
    """Axes to mirror in the end: those that were mirrored before, and the columns where flip (N,)."""
    back_yx = mirror_yx.copy()
    back_yx[:, 1] ^= flip
    return back_yx


def _kernel_margin(source_px_per_px: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Source pixels that the antialiasing triangle reaches beyond a window: half its width, and one for the rounding."""
    margin: npt.NDArray[np.float64] = np.ceil(np.maximum(source_px_per_px, 1)) + 1
    return margin

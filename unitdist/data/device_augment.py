"""RandAugment and random erasing, on whole batches, on the device where the images are.

Both come after crop and flip. Which operation, with which sign, and which box: functions of (seed, epoch, sample id)
like every other draw, so a resumed run repeats them. Images are (N, 3, H, W) float32, normalized.
"""

from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from unitdist.config import DataConfig
from unitdist.data import draws
from unitdist.data.draws import Ints

Operation = Callable[[torch.Tensor, float, float], torch.Tensor]
"""(images in [0, 1], strength in [0, 1], sign -1 or 1) -> images in [0, 1]."""


def _affine(
    images: torch.Tensor, *, angle: float = 0, shift: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)
) -> torch.Tensor:
    """Rotate, shift (share of the side) or shear (degrees) about the centre; what comes in from outside is black."""
    height, width = images.shape[-2:]
    pixels = [round(shift[0] * width), round(shift[1] * height)]
    moved: torch.Tensor = transforms.affine(
        images, angle=angle, translate=pixels, scale=1.0, shear=list(shear), interpolation=InterpolationMode.BILINEAR
    )
    return moved


def _posterize(images: torch.Tensor, strength: float, _: float) -> torch.Tensor:
    levels = 2.0 ** (8 - round(4 * strength))
    return (images * 255 / (256 / levels)).floor() * (256 / levels) / 255


def _equalize(images: torch.Tensor, _strength: float, _sign: float) -> torch.Tensor:
    equalized: torch.Tensor = transforms.equalize((images * 255).round().to(torch.uint8))
    return equalized.float() / 255


# The 14 operations of RandAugment with the ranges of its authors; strength 1 is the end of each range.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda x, _strength, _sign: x,
    "autocontrast": lambda x, _strength, _sign: transforms.autocontrast(x),
    "equalize": _equalize,
    "rotate": lambda x, strength, sign: _affine(x, angle=30 * strength * sign),
    "solarize": lambda x, strength, _sign: torch.where(x >= 1 - strength, 1 - x, x),
    "posterize": _posterize,
    "color": lambda x, strength, sign: transforms.adjust_saturation(x, 1 + 0.9 * strength * sign),
    "contrast": lambda x, strength, sign: transforms.adjust_contrast(x, 1 + 0.9 * strength * sign),
    "brightness": lambda x, strength, sign: transforms.adjust_brightness(x, 1 + 0.9 * strength * sign),
    "sharpness": lambda x, strength, sign: transforms.adjust_sharpness(x, 1 + 0.9 * strength * sign),
    "shear_x": lambda x, strength, sign: _affine(x, shear=(16.7 * strength * sign, 0)),
    "shear_y": lambda x, strength, sign: _affine(x, shear=(0, 16.7 * strength * sign)),
    "translate_x": lambda x, strength, sign: _affine(x, shift=(0.45 * strength * sign, 0)),
    "translate_y": lambda x, strength, sign: _affine(x, shift=(0, 0.45 * strength * sign)),
}


def rand_augment(
    images_nchw: torch.Tensor, sample_ids: Ints, *, seed: int, epoch: int, operations: int, magnitude: int
) -> torch.Tensor:
    """`operations` random ones after another, each of strength magnitude / 10. images_nchw in [0, 1].

    Samples that drew the same operation and sign go through it together: at most 28 calls per round, chosen on the
    host, without waiting for the device.
    """
    images_nchw = images_nchw.clone(memory_format=torch.preserve_format)
    functions = list(OPERATIONS.values())
    for number in range(operations):
        chosen = draws.integer(seed, epoch, sample_ids, draws.OPERATION + number, 2 * len(functions))
        for value in np.unique(chosen):
            rows = torch.from_numpy(np.flatnonzero(chosen == value)).to(images_nchw.device, non_blocking=True)
            sign = 1.0 if value % 2 else -1.0
            result = functions[int(value) // 2](images_nchw[rows], magnitude / 10, sign)
            images_nchw[rows] = result.clamp(0, 1)
    return images_nchw


def erased_boxes(sample_ids: Ints, side_px: int, *, seed: int, epoch: int, probability: float) -> Ints:
    """(N, 4) top, left, bottom, right of the box to erase, empty where nothing is erased.

    Area 2 to 33 % of the image, log-uniform aspect ratio 0.3 to 3.3; a box that does not fit is cut at the side.
    """
    area_share = 0.02 + 0.31 * draws.uniform(seed, epoch, sample_ids, draws.ERASE_AREA)
    aspect = np.exp(np.log(0.3) + np.log(3.3 / 0.3) * draws.uniform(seed, epoch, sample_ids, draws.ERASE_ASPECT))
    height = np.minimum(np.rint(side_px * np.sqrt(area_share * aspect)), side_px).astype(np.int64)
    width = np.minimum(np.rint(side_px * np.sqrt(area_share / aspect)), side_px).astype(np.int64)
    top = draws.integer(seed, epoch, sample_ids, draws.ERASE_Y, side_px - height + 1)
    left = draws.integer(seed, epoch, sample_ids, draws.ERASE_X, side_px - width + 1)
    wanted = draws.uniform(seed, epoch, sample_ids, draws.ERASE) < probability
    boxes = np.stack([top, left, top + height, left + width], axis=1)
    return np.where(wanted[:, None], boxes, 0)


def random_erasing(
    images_nchw: torch.Tensor, sample_ids: Ints, *, seed: int, epoch: int, probability: float
) -> torch.Tensor:
    """Set a random box to the mean colour (0 in normalized images)."""
    side = images_nchw.shape[-1]
    boxes = erased_boxes(sample_ids, side, seed=seed, epoch=epoch, probability=probability)
    top, left, bottom, right = torch.from_numpy(boxes).to(images_nchw.device).unbind(1)
    at = torch.arange(side, device=images_nchw.device)
    in_rows = (at >= top[:, None]) & (at < bottom[:, None])
    in_columns = (at >= left[:, None]) & (at < right[:, None])
    erased = images_nchw.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)
    # masked_fill takes the strides of the mask when it has to choose.
    return erased.contiguous(memory_format=torch.channels_last)


def augment_on_device(
    images_nchw: torch.Tensor, sample_ids: Ints, config: DataConfig, *, seed: int, epoch: int
) -> torch.Tensor:
    """What data.randaugment_operations and data.erasing_probability ask for; the same tensor when nothing."""
    if config.randaugment_operations:
        shape = (1, len(config.mean), 1, 1)
        mean = torch.tensor(config.mean, device=images_nchw.device).view(shape)
        std = torch.tensor(config.std, device=images_nchw.device).view(shape)
        augmented = rand_augment(
            images_nchw * std + mean,
            sample_ids,
            seed=seed,
            epoch=epoch,
            operations=config.randaugment_operations,
            magnitude=config.randaugment_magnitude,
        )
        images_nchw = (augmented - mean) / std
    if config.erasing_probability:
        images_nchw = random_erasing(
            images_nchw, sample_ids, seed=seed, epoch=epoch, probability=config.erasing_probability
        )
    return images_nchw

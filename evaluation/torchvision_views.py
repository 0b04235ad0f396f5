"""The views of an image by torchvision's transforms on PIL images: the reference that the DALI decoder is compared with.

Decoded by PIL, converted to RGB, EXIF rotation ignored, resized bilinearly with antialiasing (PIL always antialiases), to
uint8: what torchvision's ImageFolder, Resize, FiveCrop and CenterCrop do, to the bit.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from evaluation.decoding import DecodedChunk, EncodedImage, window_count
from evaluation.views import Pass, crop_offsets, resized_size


class TorchvisionDecoder:
    """Decodes on CPU threads; PIL releases the interpreter while it works."""

    def __init__(self, passes: Sequence[Pass], *, crop_px: int, num_threads: int | None = None) -> None:
        self._passes = tuple(passes)
        self._crop_px = crop_px
        self._threads = ThreadPoolExecutor(max_workers=num_threads or os.cpu_count() or 1)

    def decode(self, images: list[EncodedImage]) -> DecodedChunk:
        """Pixels of one chunk; see `Decoder.decode`."""
        results = list(self._threads.map(self._views_or_reason, images))
        broken = {position: result for position, result in enumerate(results) if isinstance(result, str)}
        kept = tuple(position for position in range(len(images)) if position not in broken)
        pixels = [result for result in results if not isinstance(result, str)]
        crops, wholes = {}, {}
        for plan in self._passes if pixels else ():
            arrays = [torch.from_numpy(views[plan.name]) for views in pixels]
            if plan.kind == "crops":
                crops[plan.name] = torch.stack(arrays)
            else:
                wholes[plan.name] = arrays
        return DecodedChunk(kept=kept, broken=broken, crops=crops, wholes=wholes)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()

    def _views_or_reason(self, encoded: EncodedImage) -> dict[str, np.ndarray] | str:
        try:
            with Image.open(io.BytesIO(encoded.content)) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises each of these for damaged files
            return str(error) or type(error).__name__
        return {plan.name: pass_pixels(image, plan, self._crop_px) for plan in self._passes}


def pass_pixels(image: Image.Image, plan: Pass, crop_px: int) -> np.ndarray:
    """uint8 pixels of one pass: (windows, crop, crop, 3) for crops, (height, width, 3) for whole."""
    height, width = resized_size(image.height, image.width, plan.scale_px)
    resized = transforms.resize(image, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True)
    if plan.kind == "whole":
        return np.array(resized)
    offsets = crop_offsets(height, width, crop_px, window_count(plan))
    return np.stack([np.asarray(transforms.crop(resized, top, left, crop_px, crop_px)) for top, left in offsets])

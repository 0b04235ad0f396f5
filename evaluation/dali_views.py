"""The views of an image by DALI: one decode, every crop cut by a fused resize-and-crop, whole images at every scale.

The only file of this folder that imports DALI. Bytes and geometry come from outside (`external_source`): DALI draws, shuffles
and computes nothing of its own, so the pixels of an image do not depend on the images beside it.

Settings that equal PIL's bilinear resize (antialiased) within 1 grey level inside the image, and within 16 on its outermost ring
of pixels, where DALI repeats the edge and PIL renormalizes the kernel: linear interpolation with antialiasing, no fast IDCT,
EXIF rotation ignored, output sizes and offsets given explicitly. On a GPU the decoder is nvJPEG with the CPU's chroma upsampling.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from evaluation.decoding import DecodedChunk, EncodedImage, window_count
from evaluation.views import Pass, crop_offsets, resized_size


class DaliDecoder:
    """Decodes on `num_threads` CPU threads, or on the GPU `device_id` (pixels then stay there)."""

    def __init__(
        self, passes: Sequence[Pass], *, crop_px: int, images_per_chunk: int, num_threads: int | None = None, device_id: int | None = None
    ) -> None:
        self._passes = tuple(passes)
        self._crop_px = crop_px
        self._images_per_chunk = images_per_chunk
        self._num_threads = num_threads or os.cpu_count() or 1
        self._device_id = device_id
        self._pipeline: Pipeline | None = None

    def decode(self, images: list[EncodedImage]) -> DecodedChunk:
        """Pixels of one chunk; see `Decoder.decode`.

        An unreadable file kills DALI's whole batch and leaves the pipeline unusable: the chunk is then decoded one by one to
        find the culprits, and once more without them.
        """
        if not images:
            return DecodedChunk(kept=(), broken={}, crops={}, wholes={})
        outputs = self._run(images)
        broken: dict[int, str] = {}
        if isinstance(outputs, str):
            alone = {position: self._run([image]) for position, image in enumerate(images)}
            broken = {position: reason for position, reason in alone.items() if isinstance(reason, str)}
            readable = [image for position, image in enumerate(images) if position not in broken]
            outputs = self._run(readable) if readable else ()
            if isinstance(outputs, str):
                raise RuntimeError(f"DALI decodes each of {len(readable)} images alone but not together: {outputs}")
        kept = tuple(position for position in range(len(images)) if position not in broken)
        crops, wholes = {}, {}
        for plan, output in zip(self._passes, outputs, strict=bool(kept)):
            if plan.kind == "crops":
                crops[plan.name] = _owned(output.as_tensor())
            else:
                wholes[plan.name] = [_owned(output[position]) for position in range(len(output))]
        return DecodedChunk(kept=kept, broken=broken, crops=crops, wholes=wholes)

    def close(self) -> None:
        """Drop the pipeline with its threads and memory."""
        self._pipeline = None

    def _run(self, images: list[EncodedImage]) -> tuple[Any, ...] | str:
        """The pipeline's outputs, or the reason why it could not run."""
        if self._pipeline is None:
            self._pipeline = self._build()
        self._pipeline.feed_input("encoded", [np.frombuffer(image.content, dtype=np.uint8) for image in images])
        for plan in self._passes:
            self._pipeline.feed_input(plan.name, [self._geometry(plan, image) for image in images])
        try:
            return tuple(self._pipeline.run())
        except RuntimeError as error:
            self._pipeline = None
            complaint = _decoder_complaint(error)
            if complaint is None:
                raise
            return complaint

    def _geometry(self, plan: Pass, image: EncodedImage) -> np.ndarray:
        """float32 (windows, 4): resized height and width, and where DALI has to cut, as shares of what is left over."""
        height, width = resized_size(image.height, image.width, plan.scale_px)
        if plan.kind == "whole":
            return np.array([[height, width, 0, 0]], dtype=np.float32)
        spare_height, spare_width = max(height - self._crop_px, 1), max(width - self._crop_px, 1)
        offsets = crop_offsets(height, width, self._crop_px, window_count(plan))
        return np.array([[height, width, top / spare_height, left / spare_width] for top, left in offsets], dtype=np.float32)

    def _build(self) -> Pipeline:
        pipeline = _views_pipeline(
            self._passes,
            self._crop_px,
            batch_size=self._images_per_chunk,
            num_threads=self._num_threads,
            device_id=self._device_id,
            # One batch at a time, run by the caller's thread: an error then belongs to the batch that caused it.
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline


@pipeline_def  # type: ignore[untyped-decorator]
def _views_pipeline(passes: tuple[Pass, ...], crop_px: int) -> tuple[Any, ...]:
    on_gpu = Pipeline.current().device_id is not None
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    image = fn.decoders.image(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        use_fast_idct=False,
        jpeg_fancy_upsampling=True,
    )
    outputs = []
    for plan in passes:
        geometry = fn.external_source(name=plan.name, dtype=types.FLOAT, ndim=2)
        if plan.kind == "whole":
            outputs.append(fn.resize(image, size=geometry[0, 0:2], interp_type=types.INTERP_LINEAR, antialias=True))
            continue
        windows = [
            fn.resize_crop_mirror(
                image,
                size=geometry[window, 0:2],
                crop=(crop_px, crop_px),
                crop_pos_y=geometry[window, 2],
                crop_pos_x=geometry[window, 3],
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            for window in range(window_count(plan))
        ]
        outputs.append(fn.stack(*windows))
    return tuple(outputs)


def _owned(tensor: object) -> torch.Tensor:
    """A copy that outlives DALI's buffer, on the same device."""
    return torch.utils.dlpack.from_dlpack(tensor).clone()


def _decoder_complaint(error: RuntimeError) -> str | None:
    """What DALI's decoder says about a file, out of its long message; None when another operator failed."""
    message = str(error)
    if "decoders.image" not in message:
        return None
    _, _, tail = message.partition("encountered:")
    lines = [line.strip() for line in tail.splitlines() if line.strip() and "pipeline object" not in line]
    # Each file is tried alone, so the number that DALI gives it says nothing.
    return lines[0].replace(" sample #0", "").rstrip(" :") if lines else "it cannot be decoded"

"""DALI: one pipeline definition for CPU (device_id=None) and GPU, fed with bytes and geometry from Python.

DALI decodes and, on the GPU, resamples and normalizes (resample.py does it on the CPU); it draws nothing and reads nothing.
Order, files and windows come from our own modules, which is why a loader needs no DALI checkpoint: every batch is a
function of (seed, epoch, position).
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from nvidia.dali import Pipeline, fn, types

from unitdist.data.draws import Ints
from unitdist.data.geometry import CornerRegion, Geometry, ResizeThenCrop, corner_region, decode_region
from unitdist.data.reading import (
    BrokenCount,
    EncodedBatch,
    ImageSource,
    ReadingPolicy,
    read_ahead,
    unreadable_error,
)
from unitdist.data.resample import Pixels, Regions
from unitdist.errors import DataError

GeometryOf = Callable[[Ints, Ints], Geometry]
"""(sample_ids (b,), size_hw (b, 2)) -> the windows of these samples."""


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """What the pipeline computes and on what. mean and std: per channel, in units of the full range [0, 1].

    device_id: the GPU that gets the batches, None for the CPU. roi_decode: decode only the window's region.
    crop_then_resize: the geometries are of this kind. GPU only: gpu_decode, decode and resample there rather than on
    the CPU; hw_decoder_load, share of the images that the hardware JPEG decoder takes; set_affinity, bind threads to
    near cores.
    """

    batch_size: int
    side_px: int
    num_threads: int
    device_id: int | None
    prefetch_batches: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    roi_decode: bool
    crop_then_resize: bool = False
    gpu_decode: bool = True
    hw_decoder_load: float = 0.65
    set_affinity: bool = False

    @property
    def decodes_on_gpu(self) -> bool:
        """All of the pipeline runs there and ends with normalized squares; on the CPU it ends with decoded regions."""
        return self.device_id is not None and self.gpu_decode

    @property
    def by_region(self) -> bool:
        """The window reaches the pipeline as a region of the image, not as a resize of all of it."""
        return self.roi_decode or self.crop_then_resize or not self.decodes_on_gpu


def _decode_arguments(settings: GraphSettings) -> dict[str, Any]:
    """Options that make every DALI decoder agree with libjpeg as Pillow and torchvision use it."""
    arguments: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "use_fast_idct": False}
    if not settings.decodes_on_gpu:
        return arguments | {"device": "cpu"}
    # Without fancy upsampling nvJPEG's colours differ from libjpeg's, and with them the accuracy.
    return arguments | {
        "device": "mixed",
        "jpeg_fancy_upsampling": True,
        "hw_decoder_load": settings.hw_decoder_load,
    }


def _regions(settings: GraphSettings, encoded: Any, start: Any, shape: Any) -> Any:
    """(h, w, C) uint8: one region of each image, decoded alone where roi_decode."""
    if settings.roi_decode:
        region = {"start": start, "shape": shape, "axes": [0, 1]}
        return fn.decoders.image_slice(encoded, **region, **_decode_arguments(settings))
    image = fn.decoders.image(encoded, **_decode_arguments(settings))
    return fn.slice(image, start=start, shape=shape, axes=[0, 1])


def _resampled(settings: GraphSettings, encoded: Any, window: list[Any]) -> Any:
    """(H, W, C) uint8 squares. window: the arrays that square_inputs returns for the same settings and geometry."""
    side = settings.side_px
    resample = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    if settings.by_region:
        start, shape, roi_start, roi_end = window
        image = _regions(settings, encoded, start, shape)
        return fn.resize(image, size=[side, side], roi_start=roi_start, roi_end=roi_end, **resample)
    resized_hw, position_y, position_x = window
    image = fn.decoders.image(encoded, **_decode_arguments(settings))
    return fn.resize_crop_mirror(
        image, size=resized_hw, crop=(side, side), crop_pos_y=position_y, crop_pos_x=position_x, **resample
    )


def graph_output(settings: GraphSettings, encoded: Any, window: list[Any]) -> Any:
    """The graph behind the inputs: (h, w, C) uint8 regions, or (H, W, C) float32 squares, mirrored and normalized."""
    if not settings.decodes_on_gpu:
        return _regions(settings, encoded, *window)
    *window, flip = window
    return fn.crop_mirror_normalize(
        _resampled(settings, encoded, window),
        mirror=flip,
        mean=[255 * value for value in settings.mean],
        std=[255 * value for value in settings.std],
        dtype=types.FLOAT,
        output_layout="HWC",
    )


def region_inputs(region: CornerRegion) -> list[np.ndarray[Any, Any]]:
    """On the CPU, the pipeline's arrays besides the encoded images: (b, 2) int32, start and shape."""
    return [region.start_yx.astype(np.int32), region.shape_hw.astype(np.int32)]


def square_inputs(settings: GraphSettings, geometry: Geometry, size_hw: Ints) -> list[np.ndarray[Any, Any]]:
    """On the GPU, the pipeline's arrays besides the encoded images: the window, and (b,) int32, where to mirror."""
    flip = geometry.flip.astype(np.int32)
    if settings.by_region:
        region = decode_region(geometry, size_hw, settings.side_px)
        start, shape = region.start_yx.astype(np.int32), region.shape_hw.astype(np.int32)
        return [start, shape, region.roi_start_yx, region.roi_end_yx, flip]
    # DALI wants the crop's place as a share of the free space and rounds back to the whole pixel that it came from.
    assert isinstance(geometry, ResizeThenCrop)
    free_hw = np.maximum(geometry.resized_hw - settings.side_px, 1)
    share = (geometry.offset_yx / free_hw).astype(np.float32)
    return [geometry.resized_hw.astype(np.float32), share[:, 0].copy(), share[:, 1].copy(), flip]


def window_arrays(settings: GraphSettings) -> list[tuple[types.DALIDataType, int]]:
    """(type, axes behind the sample's) of each array of region_inputs or square_inputs."""
    if not settings.decodes_on_gpu:
        return [(types.INT32, 1)] * 2
    if settings.by_region:
        return [(types.INT32, 1)] * 2 + [(types.FLOAT, 1)] * 2 + [(types.INT32, 0)]
    return [(types.FLOAT, 1), (types.FLOAT, 0), (types.FLOAT, 0), (types.INT32, 0)]


def build_pipeline(settings: GraphSettings, source: Callable[[], list[Any]]) -> Pipeline:
    """The pipeline: encoded images -> graph_output. source raises StopIteration at the end."""
    pipeline = Pipeline(
        batch_size=settings.batch_size,
        num_threads=settings.num_threads,
        device_id=settings.device_id,
        prefetch_queue_depth=settings.prefetch_batches,
        set_affinity=settings.set_affinity and settings.device_id is not None,
    )
    kinds, axes = zip(*window_arrays(settings), strict=True)
    with pipeline:
        encoded, *window = fn.external_source(
            source=source,
            num_outputs=1 + len(kinds),
            batch=True,
            no_copy=True,
            dtype=[types.UINT8, *kinds],
            ndim=[1, *axes],
        )
        pipeline.set_outputs(graph_output(settings, encoded, window))
    pipeline.build()
    return pipeline


class _Feed:
    """The pipeline's source: hands over prepared batches and keeps those alive that DALI still works on."""

    def __init__(self, settings: GraphSettings) -> None:
        self._settings = settings
        # no_copy: DALI reads our buffers, so they must outlive every batch in flight.
        self.in_flight: deque[tuple[EncodedBatch, list[Any]]] = deque(maxlen=settings.prefetch_batches + 4)
        # On the CPU: what Regions tell of the batches in DALI's hands, which come out in this order.
        self.regions: deque[CornerRegion] = deque()
        self.batches: Iterator[EncodedBatch] = iter(())
        self.geometry_of: GeometryOf | None = None
        self.on_batch: Callable[[EncodedBatch], None] | None = None

    def __call__(self) -> list[Any]:
        batch = next(self.batches)
        assert self.geometry_of is not None and self.on_batch is not None
        self.on_batch(batch)
        geometry = self.geometry_of(batch.sample_ids, batch.size_hw)
        if self._settings.decodes_on_gpu:
            window = square_inputs(self._settings, geometry, batch.size_hw)
        else:
            self.regions.append(corner_region(geometry, batch.size_hw, self._settings.side_px))
            window = region_inputs(self.regions[-1])
        arrays = [[np.frombuffer(image, dtype=np.uint8) for image in batch.images], *window]
        self.in_flight.append((batch, arrays))
        return arrays


class ImagePipeline:
    """Runs the pipeline over given sample ids; reads ahead, finds files that the decoder refuses, restarts after one.

    The pipeline is built at the first use and kept between epochs; close() frees it.
    """

    def __init__(self, settings: GraphSettings, source: ImageSource, policy: ReadingPolicy) -> None:
        self._settings = settings
        self._source = source
        self._policy = policy
        self._feed = _Feed(settings)
        self._pipeline: Pipeline | None = None
        self.broken = BrokenCount(source, policy)

    def squares(self, sample_ids: Ints, geometry_of: GeometryOf) -> Iterator[torch.Tensor]:
        """From the GPU: normalized images (b, C, H, W) in channels_last strides for each row of sample_ids (batches, b)."""
        return (_to_torch(images) for images in self._run(sample_ids, geometry_of))

    def regions(self, sample_ids: Ints, geometry_of: GeometryOf) -> Iterator[Regions]:
        """From the CPU: decoded regions for each row of sample_ids (batches, b)."""
        for images in self._run(sample_ids, geometry_of):
            yield Regions(images=to_numpy(images), region=self._feed.regions.popleft())

    def _run(self, sample_ids: Ints, geometry_of: GeometryOf) -> Iterator[Any]:
        """DALI's output for each row, after recovery from files that the decoder refuses."""
        refused: dict[int, str] = {}
        done = 0
        while done < len(sample_ids):
            try:
                for images in self._attempt(sample_ids[done:], geometry_of, refused):
                    done += 1
                    yield images
            except RuntimeError as error:  # DALI's answer to whatever goes wrong in an operator
                refused |= self._find_refused(geometry_of, error)

    def _attempt(self, sample_ids: Ints, geometry_of: GeometryOf, refused: dict[int, str]) -> Iterator[Any]:
        """One pass without recovery. Leaving it early drops the pipeline, as batches would be left inside."""
        settings = self._settings
        reader = read_ahead(
            self._source,
            sample_ids,
            self._policy,
            threads=settings.num_threads,
            batches_ahead=settings.prefetch_batches,
            refused=refused,
        )
        self._feed.batches, self._feed.geometry_of = reader, geometry_of
        self._feed.regions.clear()
        self._feed.on_batch = lambda batch: self.broken.add(batch.broken)
        if self._pipeline is None:
            self._pipeline = build_pipeline(settings, self._feed)
        try:
            while True:
                yield self._pipeline.run(_consumer_stream(settings))[0]
        except StopIteration:
            self._pipeline.reset()
        except BaseException:
            # An error, or the caller left early: batches are left inside the pipeline. in_flight stays for the search.
            self._pipeline = None
            raise
        finally:
            reader.close()

    def _find_refused(self, geometry_of: GeometryOf, error: RuntimeError) -> dict[int, str]:
        """Decode the samples in flight one by one; {sample id: reason} of those that fail. Raises DataError."""
        found: dict[int, str] = {}
        for batch, _ in list(self._feed.in_flight):
            for row in range(len(batch.images)):
                if not self._decodes(batch.rows(slice(row, row + 1)), geometry_of):
                    found[int(batch.read_ids[row])] = "the decoder refuses it"
        if not self._feed.in_flight:
            raise DataError(f"DALI cannot start: {error}") from error
        if not found:
            raise DataError(f"DALI stopped, but every image of the batch decodes alone: {error}") from error
        if not self._policy.replace:
            sample_id, reason = next(iter(found.items()))
            raise unreadable_error(self._source.name(sample_id), reason)
        return found

    def _decodes(self, batch: EncodedBatch, geometry_of: GeometryOf) -> bool:
        """Whether a pipeline of its own, with the same operators, gets through this batch of one image."""
        settings = replace(self._settings, batch_size=1, num_threads=1)
        feed = _Feed(settings)
        feed.batches, feed.geometry_of, feed.on_batch = iter([batch]), geometry_of, lambda _: None
        try:
            build_pipeline(settings, feed).run()
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Free the pipeline and its threads; the next run builds another."""
        self._pipeline = None
        self._feed.in_flight.clear()


def _consumer_stream(settings: GraphSettings) -> torch.cuda.Stream | None:
    """The stream on which the batch will be computed on. DALI orders its output, and the reuse of its memory, behind what that
    stream was given: the host waits for nothing, and no batch is overwritten while kernels still read it."""
    return torch.cuda.current_stream(settings.device_id) if settings.decodes_on_gpu else None


def _to_torch(images: Any) -> torch.Tensor:
    """DALI's (N, H, W, C) tensor list as (N, C, H, W) in channels_last strides, without a copy."""
    images_nhwc: torch.Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
    return images_nhwc.permute(0, 3, 1, 2)


def to_numpy(images: Any) -> list[Pixels]:
    """DALI's list of (h, w, C) uint8 on the CPU as arrays, without a copy."""
    return [np.asarray(images[row]) for row in range(len(images))]

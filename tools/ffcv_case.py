"""FFCV for tools/bench_loader.py: random-resized-crop on a file that FFCV writes itself. Written after FFCV's documentation;
FFCV needs OpenCV, turbojpeg and a numba that fits, and was not installed where the published figures were measured."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image

from unitdist.data.index import scan_image_folder


class _Images:
    """FFCV's writer takes any indexed data set of (image, label)."""

    def __init__(self, folder: Path) -> None:
        self._index = scan_image_folder(folder)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, sample_id: int) -> tuple[Image.Image, int]:
        with Image.open(self._index.name(sample_id)) as image:
            return image.convert("RGB"), int(self._index.labels[sample_id])


def ffcv_loader(folder: Path) -> Callable[[], Iterator[object]]:
    """An endless stream of batches of 64 uint8 images of 224 px, one worker."""

    def batches() -> Iterator[object]:
        with tempfile.TemporaryDirectory() as place:
            path = f"{place}/train.beton"
            image = RGBImageField(write_mode="jpg", jpeg_quality=92)
            DatasetWriter(path, {"image": image, "label": IntField()}, num_workers=1).from_indexed_dataset(
                _Images(folder)
            )
            decoder = RandomResizedCropRGBImageDecoder((224, 224))
            loader = Loader(
                path,
                batch_size=64,
                num_workers=1,
                order=OrderOption.RANDOM,
                drop_last=True,
                pipelines={
                    "image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
                    "label": [IntDecoder(), ToTensor()],
                },
            )
            while True:
                yield from loader

    return batches

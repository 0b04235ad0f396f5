"""Mean, standard deviation and sizes of a split's images, and a picture of the sizes.

The moments are over all pixels of the images looked at, in the units of data.mean and data.std.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from unitdist.config import DataConfig
from unitdist.data import draws
from unitdist.data.build import open_source
from unitdist.data.header import UnreadableImage
from unitdist.data.reading import ImageSource, read_checked
from unitdist.errors import ConfigError
from unitdist.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="data.path: the folder that holds the splits")
    parser.add_argument("--split", default="train", help="name of the split")
    parser.add_argument("--source", choices=("folder", "manifest", "webdataset", "tfrecord"), default="folder")
    parser.add_argument("--images", type=int, default=2000, help="images to look at, drawn at random")
    parser.add_argument("--picture", type=Path, default=Path("image_sizes.png"), help="histogram of the sizes")


def moments(source: ImageSource, sample_ids: list[int]) -> tuple[list[float], list[float], npt.NDArray[np.int64]]:
    """(mean, std) per channel in [0, 1], exact integer sums, and the (height, width) of each image."""
    total, total_sq, pixels, sizes = np.zeros(3, dtype=object), np.zeros(3, dtype=object), 0, []
    for sample_id in tqdm(sample_ids, unit="img", disable=None):
        try:
            data, size = read_checked(source, sample_id, 64_000_000)
        except UnreadableImage as error:
            print(f"skipped {source.name(sample_id)} ({error})")
            continue
        with Image.open(io.BytesIO(data)) as image:
            values = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(np.int64)
        total += values.sum(axis=0).astype(object)
        total_sq += (values**2).sum(axis=0).astype(object)
        pixels += len(values)
        sizes.append(size)
    mean = [value / pixels for value in total]
    std = [float(np.sqrt(value / pixels - m * m)) for value, m in zip(total_sq, mean, strict=True)]
    return [float(m) / 255 for m in mean], [s / 255 for s in std], np.asarray(sizes, dtype=np.int64)


def draw_sizes(sizes_hw: npt.NDArray[np.int64], path: Path) -> None:
    """Histograms of the shorter side and of width over height."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("--picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(sizes_hw.min(axis=1), bins=40)
    left.set(xlabel="shorter side in pixels", ylabel="images")
    right.hist(sizes_hw[:, 1] / sizes_hw[:, 0], bins=40)
    right.set(xlabel="width / height")
    figure.savefig(path, dpi=120)


def run(options: argparse.Namespace) -> int:
    if options.images < 1:
        raise ConfigError("--images must be >= 1")
    source = open_source(DataConfig(source=options.source), options.folder / options.split)
    ids = np.argsort(draws.hash64(0, 0, np.arange(len(source), dtype=np.int64), draws.ORDER))[: options.images]
    mean, std, sizes = moments(source, sorted(ids.tolist()))
    counts = np.bincount(source.labels)
    print(
        f"{counted(len(source), 'image')} in {counted(len(counts), 'class', 'classes')}, {counts.min():,} to {counts.max():,} per class"
    )
    print(f"looked at {len(sizes):,}: mean {[round(m, 4) for m in mean]}, std {[round(s, 4) for s in std]}")
    short = np.quantile(sizes.min(axis=1), [0, 0.05, 0.5, 0.95, 1]).astype(int).tolist()
    print(f"shorter side in pixels: least, 5 %, median, 95 %, greatest: {short}")
    draw_sizes(sizes, options.picture)
    print(f"picture: {options.picture}")
    return 0

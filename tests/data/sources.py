"""Every source in small: what data.source and data.dataset can name, made from the sample data or from noise."""

import shutil
from pathlib import Path

import numpy as np

from tests.data.test_mnist import write_mnist
from tests.data.test_shards import example, tfrecord, write_tar
from unitdist.config import DataConfig
from unitdist.data.index import ImageIndex, scan_image_folder
from unitdist.data.manifest import FILES_FORMAT, SHARDS_FORMAT, write_lines
from unitdist.data.shards import tar_entries, tfrecord_entries

SOURCES = ("folder", "torchvision", "manifest", "webdataset", "tfrecord", "mnist", "cifar10", "synthetic")
IMAGES_PER_SHARD = 25


def make_source(name: str, sample_data: Path, folder: Path) -> DataConfig:
    """Write the source under `folder`; its config: 192 images at 32 px where they come from the sample data."""
    images = {"image_size_px": 32, "scale_range_px": (37, 68), "val_resize_px": 37, "num_threads": 1}
    if name in ("folder", "torchvision"):
        loader = "dali" if name == "folder" else "torchvision"
        return DataConfig(path=str(sample_data), loader=loader, **images)  # type: ignore[arg-type]
    if name in ("manifest", "webdataset", "tfrecord"):
        for split in ("train", "val"):
            write_split(name, scan_image_folder(sample_data / split), folder / split)
        return DataConfig(path=str(folder), source=name, shuffle_window=40, **images)  # type: ignore[arg-type]
    if name == "mnist":
        write_mnist(folder / "MNIST" / "raw", count=60)
        small = {"image_size_px": 28, "mean": (0.13,), "std": (0.31,), "augmentation": "none"}
        return DataConfig(path=str(folder), dataset="mnist", loader="resident", **small)  # type: ignore[arg-type]
    if name == "cifar10":
        write_cifar10(folder)
        augmented = {"image_size_px": 32, "augmentation": "pad_crop_flip"}
        return DataConfig(path=str(folder), dataset="cifar10", loader="resident", **augmented)  # type: ignore[arg-type]
    assert name == "synthetic"
    return DataConfig(
        dataset="synthetic", loader="synthetic", image_size_px=8, synthetic_samples=100, synthetic_classes=7
    )


def write_split(kind: str, index: ImageIndex, folder: Path) -> None:
    classes = list(index.class_to_idx)
    if kind == "manifest":
        shutil.copytree(index.root, folder)
        rows = zip(index.paths, index.labels, strict=True)
        lines = [f"{path}\t{label}\t1\t1\t1\t00000000\tok\t" for path, label in rows]
        write_lines(folder.with_name(f"{folder.name}.tsv"), FILES_FORMAT, {"classes": classes}, lines)
        return
    folder.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(index))
    lines, shards = [], []
    for number, start in enumerate(range(0, len(order), IMAGES_PER_SHARD)):
        path = folder / f"{number:03d}.{'tar' if kind == 'webdataset' else 'tfrecord'}"
        ids = order[start : start + IMAGES_PER_SHARD].tolist()
        if kind == "webdataset":
            write_tar(path, {index.paths[i]: index.read(i) for i in ids})
        else:
            records = [{"image/encoded": index.read(i), "image/class/label": int(index.labels[i])} for i in ids]
            path.write_bytes(tfrecord([example(record) for record in records]))
        entries = tar_entries(path) if kind == "webdataset" else tfrecord_entries(path)
        for i, entry in zip(ids, entries, strict=True):
            lines.append(f"{number}\t{entry.offset}\t{entry.size}\t{index.labels[i]}\t00000000\t{entry.name}")
        shards.append(path.name)
    write_lines(folder / "index.tsv", SHARDS_FORMAT, {"kind": kind, "classes": classes, "shards": shards}, lines)


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        records = random.integers(0, 256, (20, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())

"""An ImageFolder on disk as a list: folder/<class>/<image>, labels by sorted class name as in torchvision."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from unitdist.data.draws import Ints
from unitdist.data.order import epoch_order
from unitdist.errors import ConfigError, DataError
from unitdist.wording import counted

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """Images of one split. A sample id is a position in `paths`; `paths` are relative to `root`, sorted.

    labels: (N,) int64. class_to_idx: class name -> label. ignored: files that are hidden or no images.
    """

    root: Path
    paths: list[str]
    labels: Ints
    class_to_idx: dict[str, int]
    ignored: int = 0

    kind = "image_folder"

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample_id: int) -> bytes:
        """The encoded bytes of one image. Raises OSError."""
        # os.open is a third cheaper than open(): no buffer object, no seekable check.
        descriptor = os.open(f"{self.root}/{self.paths[sample_id]}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            data = os.read(descriptor, size)
            while len(data) < size and (more := os.read(descriptor, size - len(data))):
                data += more
            return data
        finally:
            os.close(descriptor)

    def name(self, sample_id: int) -> str:
        """Where the image lies, for messages."""
        return str(self.root / self.paths[sample_id])

    def order(self, seed: int, epoch: int) -> Ints:
        """The epoch's order of sample ids, the same for every world size."""
        return epoch_order(len(self), seed, epoch)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over paths and labels: two indexes with this hash give the same ids to the same samples."""
        digest = hashlib.sha256("\n".join(self.paths).encode("utf-8", "surrogateescape"))
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


def require_folder(folder: Path) -> None:
    """Raise ConfigError when the folder that the user named does not exist or is a file."""
    if not folder.exists():
        raise ConfigError(f"data.path: no such folder: {folder}")
    if not folder.is_dir():
        raise ConfigError(f"data.path: {folder} is a file, expected a folder with one folder of images per class")


def class_names(folder: Path) -> list[str]:
    """Sorted names of the class folders (all folders that are not hidden)."""
    require_folder(folder)
    with _entries(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _entries(folder: Path) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise ConfigError(f"data.path: cannot read {folder}: {error.strerror}") from None


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def _first_few(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


def _scan_class(folder: Path, class_name: str) -> tuple[list[str], int, list[str]]:
    """(image paths relative to folder, files ignored, images that lie deeper than the class folder)."""
    paths, ignored, too_deep = [], 0, []
    with _entries(folder / class_name) as entries:
        for entry in entries:
            if entry.is_dir():
                deeper = [name for _, _, names in os.walk(entry.path) for name in names if _is_image_name(name)]
                too_deep += [f"{class_name}/{entry.name}/{name}" for name in deeper]
            elif _is_image_name(entry.name):
                paths.append(f"{class_name}/{entry.name}")
            else:
                ignored += 1
    return sorted(paths), ignored, too_deep


def scan_image_folder(folder: Path) -> ImageIndex:
    """List the images of folder/<class>/*.

    Hidden files and files without an image suffix are ignored and counted. Raises ConfigError where the folder is
    missing or a file; DataError for no images at all, classes without images, and images outside class folders.
    """
    names = class_names(folder)
    with _entries(folder) as entries:
        top_files = [entry.name for entry in entries if not entry.is_dir()]
    stray = [name for name in top_files if _is_image_name(name)]
    ignored = len(top_files) - len(stray)
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for label, class_name in enumerate(names):
        found, skipped, too_deep = _scan_class(folder, class_name)
        paths += found
        labels += [label] * len(found)
        ignored += skipped
        stray += too_deep
        if not found and not too_deep:
            empty.append(class_name)
    if stray:
        raise DataError(
            f"{folder}: {counted(len(stray), 'image')} outside folder/<class>/ (first: {min(stray)}); "
            "move what lies there into class folders (python tools/data.py prepare-val does it for ImageNet's validation set)"
        )
    if not paths:
        raise DataError(
            f"{folder}: holds 0 images in {counted(len(names), 'class folder')} (looked for {' '.join(IMAGE_SUFFIXES)})"
        )
    if empty:
        raise DataError(f"{folder}: {len(empty)} of {len(names)} classes hold no image: {_first_few(empty)}")
    return ImageIndex(
        root=folder,
        paths=paths,
        labels=np.asarray(labels, dtype=np.int64),
        class_to_idx={name: label for label, name in enumerate(names)},
        ignored=ignored,
    )


def require_same_classes(train_names: list[str], val_names: list[str], *, train: Path, val: Path) -> None:
    """Raise DataError when the two splits do not have the same classes: labels would be shifted in silence."""
    only_train = sorted(set(train_names) - set(val_names))
    only_val = sorted(set(val_names) - set(train_names))
    if only_train or only_val:
        lacks = [f"{val} lacks {_first_few(only_train)}"] if only_train else []
        lacks += [f"{train} lacks {_first_few(only_val)}"] if only_val else []
        raise DataError(
            f"the classes of training and validation differ ({len(train_names)} against {len(val_names)}): "
            + "; ".join(lacks)
        )

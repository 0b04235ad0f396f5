"""The images of an evaluation: where they are, their labels, and the sizes that their headers state."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.decoding import EncodedImage
from unitdist.data.index import IMAGE_SUFFIXES, ImageIndex, scan_image_folder
from unitdist.data.manifest import SHARDS_FORMAT, ShardIndex, load_shards, read_header
from unitdist.data.reading import ImageSource
from unitdist.errors import ConfigError, DataError
from unitdist.wording import counted

SHARD_INDEX = "index.tsv"
"""What tools/data.py writes beside tars and TFRecords."""

SCAN_THREADS = 16
"""Headers read at a time; on network storage the wait dominates."""


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """N images in the fixed order in which they are reported; an image's id is its position.

    `shapes`: (height, width) as stored, (0, 0) where the header cannot be read; `broken` holds the reason for those.
    `class_to_idx` may be empty where a labels file gave numbers. `source` reads them: files of a folder, or tars and TFRecords with an
    index.
    """

    source: ImageSource
    root: Path
    names: tuple[str, ...]
    labels_n: np.ndarray
    shapes: tuple[tuple[int, int], ...]
    class_to_idx: dict[str, int]
    broken: dict[int, str]

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 over names, labels and sizes."""
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(self.labels_n.tobytes())
        digest.update(repr(self.shapes).encode())
        return digest.hexdigest()

    def read(self, image_id: int) -> EncodedImage:
        """The file's bytes. Raises DataError when it can no longer be read."""
        try:
            content = self.source.read(image_id)
        except OSError as error:
            raise DataError(f"cannot read {self.source.name(image_id)}: {error.strerror or error}") from None
        height, width = self.shapes[image_id]
        return EncodedImage(name=self.names[image_id], content=content, height=height, width=width)


def list_images(
    data: Path | ImageSource, *, labels_file: Path | None = None, class_to_idx: dict[str, int] | None = None, val_split: str = "val"
) -> ImageList:
    """The images of folder/<class>/*, of a flat folder with a labels file, of tars or TFRecords beside an index.tsv, or of a source
    that is open already, with their sizes.

    `class_to_idx` is the training's, if known. A folder that holds `val_split` stands for that split. Raises ConfigError for a
    wrong path, DataError for what lies there.
    """
    try:
        if not isinstance(data, Path):
            return _with_sizes(data)
        if not data.is_dir():
            raise ConfigError(f"--data: {data} {'is a file, not a folder' if data.exists() else 'does not exist'}")
        if labels_file is not None:
            return _with_sizes(_labelled(data, labels_file, class_to_idx))
        folder = _split_folder(data, val_split, class_to_idx or {})
        if (folder / SHARD_INDEX).is_file():
            kind = read_header(folder / SHARD_INDEX, SHARDS_FORMAT)["kind"]
            return _with_sizes(load_shards(folder / SHARD_INDEX, kind, window_samples=1))  # the window is for shuffling
        return _with_sizes(_scan(folder))
    except OSError as error:
        raise DataError(f"cannot read {error.filename or data}: {error.strerror or error}") from None


def _with_sizes(source: ImageSource) -> ImageList:
    if isinstance(source, ImageIndex):
        root, names = source.root, tuple(source.paths)
    else:
        assert isinstance(source, ShardIndex), type(source)
        root, names = Path(source.shard_paths[0]).parent, tuple(source.names)
    with ThreadPoolExecutor(max_workers=SCAN_THREADS) as threads:
        headers = list(threads.map(partial(_header, source), range(len(names)), chunksize=64))
    return ImageList(
        source=source,
        root=root,
        names=names,
        labels_n=source.labels,
        shapes=tuple((0, 0) if isinstance(header, str) else header for header in headers),
        class_to_idx=source.class_to_idx,
        broken={position: header for position, header in enumerate(headers) if isinstance(header, str)},
    )


def require_same_labels(images: ImageList, trained: dict[str, int] | None, num_outputs: int) -> None:
    """Raise DataError unless the labels of the data are the labels that the network was trained on.

    Compared with the checkpoint's `class_to_idx` where it has one, and with the number of outputs in any case.
    """
    if trained and images.class_to_idx and trained != images.class_to_idx:
        names = sorted(set(trained) | set(images.class_to_idx))
        first = next(name for name in names if trained.get(name) != images.class_to_idx.get(name))
        there, here = (
            f"label {labels[first]}" if first in labels else "no such class" for labels in (trained, images.class_to_idx)
        )
        raise DataError(
            f"the classes of {images.root} are not those of the training: {first!r} is {there} in the checkpoint, {here} in the "
            f"data ({len(trained)} against {len(images.class_to_idx)} classes)"
        )
    classes = len(images.class_to_idx)
    if classes and classes != num_outputs:
        raise DataError(f"the network has {num_outputs} outputs, {images.root} has {classes} classes; they must be the same classes")
    if int(images.labels_n.max()) >= num_outputs or int(images.labels_n.min()) < 0:
        raise DataError(f"labels go from {images.labels_n.min()} to {images.labels_n.max()}, the network has {num_outputs} outputs")


def _split_folder(data: Path, val_split: str, trained: dict[str, int]) -> Path:
    split = data / val_split
    is_split = split.is_dir() and val_split not in trained
    is_split = is_split and any(child.is_dir() or child.name == SHARD_INDEX for child in split.iterdir())
    return split if is_split else data


def _scan(folder: Path) -> ImageIndex:
    children = list(folder.iterdir())
    images = [child.name for child in children if child.suffix.lower() in IMAGE_SUFFIXES]
    if images and not any(child.is_dir() for child in children):
        raise DataError(
            f"{folder} is flat: {counted(len(images), 'image')} (first: {min(images)}) without class folders. Give --labels FILE with one "
            "`image class` line per image, or sort the images into one folder per class"
        )
    return scan_image_folder(folder)


def _labelled(
    folder: Path, labels_file: Path, trained: dict[str, int] | None
) -> ImageIndex:
    """Images and labels of `image label` lines (spaces, tabs or commas; label: class name, or number counted from 0).

    The image may be named without its ending. Further columns and a header line of a CSV file are ignored. Every image of the
    folder must be named, once.
    """
    files = {file.name: file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES}
    stems = {Path(name).stem: name for name in files}
    if not files:
        raise DataError(f"{folder} holds no images next to which --labels {labels_file} could be read")
    try:
        lines = labels_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels: cannot read {labels_file}: {error}") from None
    label_of: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.replace(",", " ").split()
        if not fields:
            continue
        name = files.get(fields[0]) or stems.get(fields[0])
        if name is None and number == 1 and "," in line:
            continue
        if name is None or len(fields) < 2:
            problem = f"there is no image {fields[0]} in {folder}" if name is None else "expected `image label`"
            raise DataError(f"{labels_file}:{number}: {problem}")
        if name in label_of:
            raise DataError(f"{labels_file}:{number}: {name} is named twice")
        label_of[name] = fields[1]
    unnamed = sorted(set(files) - set(label_of))
    if unnamed:
        raise DataError(f"{labels_file} names {len(label_of)} of {len(files)} images in {folder}; first without a label: {unnamed[0]}")
    names = sorted(label_of)
    labels, class_to_idx = _numbers([label_of[name] for name in names], trained, labels_file)
    return ImageIndex(root=folder, paths=names, labels=np.asarray(labels, dtype=np.int64), class_to_idx=class_to_idx)


def _numbers(labels: list[str], trained: dict[str, int] | None, labels_file: Path) -> tuple[list[int], dict[str, int]]:
    if all(label.isdecimal() for label in labels) and not set(labels) <= set(trained or {}):
        return [int(label) for label in labels], {}
    class_to_idx = trained or {name: position for position, name in enumerate(sorted(set(labels)))}
    unknown = sorted(set(labels) - set(class_to_idx))
    if unknown:
        raise DataError(f"{labels_file}: class {unknown[0]!r} was not in the training ({len(unknown)} such classes)")
    return [class_to_idx[label] for label in labels], class_to_idx


def _header(source: ImageSource, image_id: int) -> tuple[int, int] | str:
    """(height, width) as stored, or why the header cannot be read. Of a file, only the header is read."""
    try:
        is_file = isinstance(source, ImageIndex)
        with Image.open(source.name(image_id) if is_file else io.BytesIO(source.read(image_id))) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"no readable image header ({type(error).__name__})"

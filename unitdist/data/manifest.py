"""Lists of images as text files: what a scan found in a folder, and where samples lie inside tar or TFRecord files.

Both are tab-separated lines under one header line `#<format>\\t<JSON>`, sorted by sample id, UTF-8. The JSON holds
"classes", the sorted class names whose positions are the labels, and "samples", the number of lines. A file without
its last line, or with a line too many, is refused.

| format | columns |
| unitdist-files-1  | path (relative to the manifest's folder), label, bytes, height, width, crc32, verdict |
| unitdist-shards-1 | shard (position in JSON "shards"), offset, bytes, label, crc32, name |
"""

import hashlib
import json
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from unitdist.data.draws import Ints
from unitdist.data.index import ImageIndex
from unitdist.data.order import block_order
from unitdist.errors import ConfigError, DataError
from unitdist.wording import counted

FILES_FORMAT = "unitdist-files-1"
SHARDS_FORMAT = "unitdist-shards-1"
OPEN_SHARDS_PER_THREAD = 16


def read_header(path: Path, expected_format: str) -> dict[str, Any]:
    """The JSON of a list's first line. Raises ConfigError for a missing file, DataError for another format."""
    if not path.is_file():
        raise ConfigError(f"data.path: no such file: {path}; make it with python tools/data.py")
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        name, _, text = file.readline().rstrip("\n").partition("\t")
    try:
        header = json.loads(text) if name == f"#{expected_format}" else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise DataError(f"{path} is no {expected_format} file; make it with python tools/data.py")
    return header


def read_lines(path: Path, header: dict[str, Any]) -> Iterator[list[str]]:
    """The lines after the header, split at tabs. Raises DataError at the end when their number is not the header's."""
    count = 0
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.readline()
        for line in file:
            if not line.endswith("\n"):
                break
            count += 1
            yield line[:-1].split("\t")
    if count != header["samples"]:
        raise DataError(f"{path} is damaged: {count:,} whole lines, its header announces {header['samples']:,}")


def header_classes(path: Path, expected_format: str) -> list[str]:
    """The class names in a list's header. Raises as read_header."""
    return [str(name) for name in read_header(path, expected_format)["classes"]]


def write_lines(path: Path, expected_format: str, header: dict[str, Any], lines: list[str]) -> None:
    """Write under a temporary name, then rename: a killed writer leaves no half list."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.write(f"#{expected_format}\t{json.dumps(header | {'samples': len(lines)})}\n")
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def require_inside(name: str, origin: Path) -> str:
    """Raise DataError for a path that leaves the data set's folder: a list may come from somebody else."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{origin} names a file outside its folder: {name!r}: refused")
    return name


def load_manifest(path: Path, root: Path) -> ImageIndex:
    """The images of a scan with verdict "ok", as if `root` had been scanned. Raises ConfigError and DataError."""
    header = read_header(path, FILES_FORMAT)
    paths: list[str] = []
    labels = array("q")
    bad = 0
    for fields in read_lines(path, header):
        name, label, verdict = fields[0], fields[1], fields[6]
        if verdict == "ok":
            if name[0] == "/" or ".." in name:
                require_inside(name, path)
            paths.append(name)
            labels.append(int(label))
        else:
            bad += 1
    classes = header["classes"]
    label_array = np.frombuffer(labels, dtype=np.int64)
    _require_labels(path, label_array, classes)
    return ImageIndex(
        root=root,
        paths=paths,
        labels=label_array,
        class_to_idx={name: label for label, name in enumerate(classes)},
        ignored=bad,
    )


def _require_labels(path: Path, labels: Ints, classes: list[str]) -> None:
    if len(labels) == 0:
        raise DataError(f"{path} lists no readable image")
    counts = np.bincount(labels, minlength=len(classes)) if labels.min() >= 0 else np.zeros(0)
    if len(counts) != len(classes):
        raise DataError(
            f"{path}: labels from {labels.min()} to {labels.max()} for {counted(len(classes), 'class', 'classes')}"
        )
    if not counts.all():
        empty = [name for name, count in zip(classes, counts, strict=True) if not count]
        raise DataError(f"{path}: {len(empty)} of {len(classes)} classes hold no image: {', '.join(empty[:5])}")


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Images inside tar or TFRecord files ("shards"), readable at random: an image is `sizes` bytes at `offsets`.

    A sample id is a position in the arrays, all (N,); samples of one shard stand together, in the shard's order.
    """

    kind: str
    shard_paths: list[str]
    shards: Ints
    offsets: Ints
    sizes: Ints
    labels: Ints
    names: list[str]
    class_to_idx: dict[str, int]
    window_samples: int
    ignored: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def read(self, sample_id: int) -> bytes:
        """The encoded bytes of one image. Raises OSError."""
        path, size, offset = self.shard_paths[self.shards[sample_id]], self.sizes[sample_id], self.offsets[sample_id]
        try:
            return _read_at(_open_shard(path), int(size), int(offset))
        except OSError:
            _forget_shard(path)  # a stale handle of network storage: the next try opens the file again
            raise

    def name(self, sample_id: int) -> str:
        """Shard and member, for messages."""
        return f"{self.shard_paths[self.shards[sample_id]]}:{self.names[sample_id]}"

    def order(self, seed: int, epoch: int) -> Ints:
        """Shards in random order, samples permuted within windows of `window_samples`: few shards open at a time."""
        starts = np.flatnonzero(np.diff(self.shards, prepend=-1))
        return block_order(starts, len(self), seed, epoch, window_samples=self.window_samples)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over names, labels, shard sizes in samples and the window."""
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(self.labels.tobytes() + self.shards.tobytes())
        digest.update(str(self.window_samples).encode())
        return digest.hexdigest()


class _OpenShards(threading.local):
    """The shards that a thread read last; closed in the order of their last use."""

    def __init__(self) -> None:
        self.by_path: OrderedDict[str, int] = OrderedDict()

    def __del__(self) -> None:
        for descriptor in self.by_path.values():
            os.close(descriptor)


_open_shards = _OpenShards()


def _open_shard(path: str) -> int:
    by_path = _open_shards.by_path
    if path in by_path:
        by_path.move_to_end(path)
        return by_path[path]
    if len(by_path) >= OPEN_SHARDS_PER_THREAD:
        os.close(by_path.popitem(last=False)[1])
    by_path[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return by_path[path]


def _forget_shard(path: str) -> None:
    descriptor = _open_shards.by_path.pop(path, None)
    if descriptor is not None:
        os.close(descriptor)


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """As many of the bytes as there are."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def load_shards(path: Path, kind: str, *, window_samples: int) -> ShardIndex:
    """The index that `tools/data.py pack` or `index` wrote beside the shards. Raises ConfigError and DataError."""
    header = read_header(path, SHARDS_FORMAT)
    if header["kind"] != kind:
        raise ConfigError(f"data.source: {path} is an index of {header['kind']} files, not of {kind}")
    shards, offsets, sizes, labels = array("q"), array("q"), array("q"), array("q")
    names: list[str] = []
    for shard, offset, size, label, _, name in read_lines(path, header):
        shards.append(int(shard))
        offsets.append(int(offset))
        sizes.append(int(size))
        labels.append(int(label))
        names.append(name)
    columns = [np.frombuffer(column, dtype=np.int64) for column in (shards, offsets, sizes, labels)]
    classes, shard_names = header["classes"], [require_inside(name, path) for name in header["shards"]]
    _require_labels(path, columns[3], classes)
    if columns[0].min() < 0 or columns[0].max() >= len(shard_names) or (np.diff(columns[0]) < 0).any():
        raise DataError(f"{path} is damaged: shards out of order or out of range")
    absent = [name for name in shard_names if not (path.parent / name).is_file()]
    if absent:
        raise ConfigError(
            f"data.path: {len(absent)} of {len(shard_names)} shards are missing, first {path.parent / absent[0]}"
        )
    return ShardIndex(
        kind=kind,
        shard_paths=[str(path.parent / name) for name in shard_names],
        shards=columns[0],
        offsets=columns[1],
        sizes=columns[2],
        labels=columns[3],
        names=names,
        class_to_idx={name: label for label, name in enumerate(classes)},
        window_samples=window_samples,
    )

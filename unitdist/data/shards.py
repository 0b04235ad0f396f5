"""Finding the images inside tar (WebDataset) and TFRecord files, so that they can be read at random afterwards.

Only headers are read. The result is an index of unitdist-shards-1 (manifest.py).
"""

import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unitdist.data.index import IMAGE_SUFFIXES
from unitdist.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image: its name, where its bytes stand in the shard, and its class as text (a name or a number)."""

    name: str
    offset: int
    size: int
    class_text: str


def tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files of an uncompressed tar. Raises DataError for anything else.

    tarfile knows no offsets without opening a member, and checks no sizes: a cut-off tar would end in silence.
    """
    total = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    if member.offset_data + member.size > total:
                        raise DataError(f"{path} is cut off inside {member.name}")
                    yield member.name, member.offset_data, member.size
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{path} is no uncompressed tar file: {error}") from error
    if total < end:
        raise DataError(f"{path} is cut off: {total:,} of at least {end:,} bytes")


def tar_entries(path: Path) -> list[Entry]:
    """The images of a WebDataset tar with their class: member KEY.cls (text), else the member's folder.

    Members with the same key (the name up to the first dot of its last part) belong to one sample. Raises DataError
    for an image without a class.
    """
    images: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, str] = {}
    with open(path, "rb") as file:
        for name, offset, size in tar_members(path):
            folder, _, base = name.rpartition("/")
            key = f"{folder}/{base.partition('.')[0]}"
            if base.lower().endswith(".cls"):
                file.seek(offset)
                classes[key] = file.read(size).decode("utf-8", "replace").strip()
            elif base.lower().endswith(IMAGE_SUFFIXES):
                images[key] = (name, offset, size)
    entries = []
    for key, (name, offset, size) in images.items():
        class_text = classes.get(key) or name.rpartition("/")[0].rpartition("/")[2]
        if not class_text:
            raise DataError(f"{path}: {name} has neither a .cls member nor a class folder")
        entries.append(Entry(name=name, offset=offset, size=size, class_text=class_text))
    return entries


def tfrecord_entries(path: Path) -> list[Entry]:
    """The images of a TFRecord file of tf.train.Example with image/encoded and image/class/synset or .../label.

    Raises DataError for a cut-off file, a wrong length checksum or a record without these features.
    """
    entries: list[Entry] = []
    total = path.stat().st_size
    with open(path, "rb") as file:
        position = 0
        while position < total:
            header = file.read(12)
            length = struct.unpack_from("<Q", header)[0] if len(header) == 12 else 0
            if len(header) < 12 or masked_crc32c(header[:8]) != struct.unpack_from("<I", header, 8)[0]:
                raise DataError(f"{path} is no TFRecord file or damaged at byte {position:,}")
            if position + 16 + length > total:
                raise DataError(f"{path} is cut off at byte {position:,}")
            record = file.read(length + 4)[:length]
            entries.append(_example_entry(path, record, position + 12, number=len(entries)))
            position += 16 + length
    return entries


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of each protobuf field; a number (wire type 0) has its value as start and -1 as end."""
    while start < end:
        tag, start = _varint(data, start)
        wire = tag & 7
        if wire == 0:
            value, start = _varint(data, start)
            yield tag >> 3, value, -1
            continue
        if wire == 2:
            length, start = _varint(data, start)
        else:
            length = {1: 8, 5: 4}[wire]
        yield tag >> 3, start, start + length
        start += length


def _example_entry(path: Path, record: bytes, offset: int, number: int) -> Entry:
    """tf.train.Example: features (1) > feature (1, repeated) > key (1), value (2) > bytes_list (1) | int64_list (3)."""
    values: dict[bytes, tuple[int, int]] = {}
    try:
        for _, start, end in _fields(record, 0, len(record)):
            for _, entry_start, entry_end in _fields(record, start, end):
                parts = {field: (a, b) for field, a, b in _fields(record, entry_start, entry_end)}
                key = record[slice(*parts[1])]
                for kind, list_start, list_end in _fields(record, *parts[2]):
                    if kind in (1, 3):  # the first value of the list; an empty list stops the record
                        values[key] = next((a, b) for _, a, b in _fields(record, list_start, list_end))
        image_start, image_end = values[b"image/encoded"]
    except (KeyError, IndexError, StopIteration, RuntimeError) as error:
        raise DataError(f"{path}: record {number} is no tf.train.Example with image/encoded") from error
    class_text = _class_of(record, values)
    if class_text is None:
        raise DataError(f"{path}: record {number} has neither image/class/synset nor image/class/label")
    name_range = values.get(b"image/filename")
    name = record[slice(*name_range)].decode("utf-8", "replace") if name_range else f"{number:06d}"
    return Entry(name=name, offset=offset + image_start, size=image_end - image_start, class_text=class_text)


def _class_of(record: bytes, values: dict[bytes, tuple[int, int]]) -> str | None:
    if b"image/class/synset" in values:
        return record[slice(*values[b"image/class/synset"])].decode("utf-8", "replace")
    if b"image/class/label" not in values:
        return None
    start, end = values[b"image/class/label"]
    # One number is stored bare, or packed into bytes.
    return str(start if end == -1 else _varint(record, start)[0])


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC32C = _crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated by 15 bits, plus a constant. Plain Python: for a few bytes only."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def crc32_of(path: Path, offset: int, size: int) -> str:
    """CRC-32 of a piece of a file as eight hex digits."""
    with open(path, "rb") as file:
        file.seek(offset)
        return f"{zlib.crc32(file.read(size)):08x}"


def class_list(texts: set[str]) -> dict[str, int]:
    """class text -> label. Numbers keep their order (and lose their offset: 1..1000 becomes 0..999), names are sorted."""
    numeric = all(text.lstrip("-").isdigit() for text in texts)
    ordered = sorted(texts, key=int) if numeric else sorted(texts)
    return {text: label for label, text in enumerate(ordered)}


def shard_paths(folder: Path, kind: str) -> list[Path]:
    """The shards of a folder, sorted. kind: webdataset (*.tar) or tfrecord (all files but hidden ones and *.tsv)."""
    if kind == "webdataset":
        return sorted(folder.glob("*.tar"))
    with os.scandir(folder) as found:
        names = [e.name for e in found if e.is_file() and not e.name.startswith(".") and not e.name.endswith(".tsv")]
    return [folder / name for name in sorted(names)]

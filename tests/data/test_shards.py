"""shards.py: images found in tars and TFRecords as others write them, and damage named."""

import io
import struct
import tarfile
from pathlib import Path

import pytest

from unitdist.data.shards import class_list, masked_crc32c, shard_paths, tar_entries, tfrecord_entries
from unitdist.errors import DataError


def write_tar(path: Path, members: dict[str, bytes], *, mode: str = "w", tar_format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, mode, format=tar_format) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def field(number: int, content: bytes) -> bytes:
    length, size = b"", len(content)
    while size >= 0x80:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def example(features: dict[str, bytes | int], *, packed: bool = True) -> bytes:
    """tf.train.Example as TensorFlow writes it."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        else:
            number, rest = b"", value
            while rest >= 0x80:
                number, rest = number + bytes([rest & 0x7F | 0x80]), rest >> 7
            number += bytes([rest])
            feature = field(3, field(1, number) if packed else b"\x08" + number)
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def tfrecord(records: list[bytes]) -> bytes:
    data = b""
    for record in records:
        length = struct.pack("<Q", len(record))
        data += length + struct.pack("<I", masked_crc32c(length)) + record + struct.pack("<I", masked_crc32c(record))
    return data


def test_checksum_is_the_published_crc32c() -> None:
    crc = 0xE3069283  # CRC-32C of "123456789"
    assert masked_crc32c(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_images_with_their_cls_members_or_folders(tmp_path: Path, tar_format: int) -> None:
    long_name = "n01440764/" + "x" * 80 + ".JPEG"
    members = {"000.jpg": b"first", "000.cls": b"7\n", "000.json": b"{}", long_name: b"second" * 300}
    write_tar(tmp_path / "a.tar", members, tar_format=tar_format)
    entries = tar_entries(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    assert [(e.name, e.class_text, content[e.offset : e.offset + e.size]) for e in entries] == [
        ("000.jpg", "7", b"first"),
        (long_name, "n01440764", b"second" * 300),
    ]


def test_tar_image_without_a_class_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"000.jpg": b"x"})
    with pytest.raises(DataError, match="000.jpg has neither a .cls member nor a class folder"):
        tar_entries(tmp_path / "a.tar")


def test_cut_off_compressed_and_foreign_tars_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {"a/0.jpg": b"x" * 5000, "a/1.jpg": b"y" * 5000})
    whole = path.read_bytes()
    path.write_bytes(whole[:7000])
    with pytest.raises(DataError, match="a.tar (is cut off inside a/1.jpg|is no uncompressed tar file)"):
        tar_entries(path)
    write_tar(path, {"a/0.jpg": b"x" * 5000}, mode="w:gz")
    with pytest.raises(DataError, match="is no uncompressed tar file"):
        tar_entries(path)
    path.write_bytes(b"text" * 500)
    with pytest.raises(DataError, match="is no uncompressed tar file"):
        tar_entries(path)


@pytest.mark.parametrize("packed", [True, False])
def test_tfrecord_images_with_synset_or_number(tmp_path: Path, packed: bool) -> None:
    image = bytes(range(256)) * 3
    records = [
        example({"image/class/label": 300, "image/encoded": image}, packed=packed),
        example(
            {
                "image/encoded": image[:100],
                "image/class/synset": b"n01440764",
                "image/class/label": 1,
                "image/filename": b"n01440764_18.JPEG",
            },
            packed=packed,
        ),
    ]
    path = tmp_path / "train-00000-of-01024"
    path.write_bytes(tfrecord(records))
    content = path.read_bytes()
    found = [(e.name, e.class_text, content[e.offset : e.offset + e.size]) for e in tfrecord_entries(path)]
    assert found == [("000000", "300", image), ("n01440764_18.JPEG", "n01440764", image[:100])]


def test_damaged_tfrecords_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r"
    whole = tfrecord([example({"image/encoded": b"x" * 200, "image/class/label": 1})] * 2)
    path.write_bytes(whole[:-50])
    with pytest.raises(DataError, match=f"cut off at byte {len(whole) // 2}"):
        tfrecord_entries(path)
    path.write_bytes(b"\x01" + whole[1:])
    with pytest.raises(DataError, match="is no TFRecord file or damaged at byte 0"):
        tfrecord_entries(path)
    for features, message in (
        ({"image/class/label": 1}, "record 0 is no tf.train.Example with image/encoded"),
        ({"image/encoded": b"x"}, "record 0 has neither image/class/synset nor image/class/label"),
    ):
        path.write_bytes(tfrecord([example(features)]))
        with pytest.raises(DataError, match=message):
            tfrecord_entries(path)


def test_numbered_classes_keep_their_order_and_lose_their_offset() -> None:
    assert class_list({"1", "2", "10"}) == {"1": 0, "2": 1, "10": 2}
    assert class_list({"n2", "n10", "n1"}) == {"n1": 0, "n10": 1, "n2": 2}


def test_shard_paths_are_sorted_and_leave_lists_out(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden", "index.tsv", "c.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in shard_paths(tmp_path, "tfrecord")] == ["a", "b", "c.tar"]
    assert [path.name for path in shard_paths(tmp_path, "webdataset")] == ["c.tar"]

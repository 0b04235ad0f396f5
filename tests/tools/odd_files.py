"""Thirty-two files that no decoder was made for, with the verdict that each deserves."""

import io
import random
import struct
import zlib

from PIL import Image


def jpeg(photograph: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    photograph.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def as_format(photograph: Image.Image, image_format: str, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    (photograph.convert(mode) if mode else photograph).save(buffer, format=image_format)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG from raw rows, for what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_size(data: bytes, height: int, width: int) -> bytes:
    """A baseline JPEG that announces another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def damaged_scan(data: bytes) -> bytes:
    """200 random bytes in the middle of the compressed pixels; no marker arises."""
    middle = len(data) * 3 // 4
    return data[:middle] + bytes(random.Random(0).choices(range(255), k=200)) + data[middle + 200 :]


def odd_files(photograph: Image.Image) -> dict[str, tuple[bytes | None, str]]:
    """{name: (content, verdict of the scan)}; None: a dangling link."""
    good, exif = jpeg(photograph, quality=90), Image.Exif()
    exif[0x0112] = 6
    refuses, foreign = "the decoder refuses it", "not a JPEG, PNG, WebP or BMP image"
    return {
        "half.jpg": (good[: len(good) // 2], "truncated JPEG: no end marker"),
        "last_2_bytes.jpg": (good[:-2], "truncated JPEG: no end marker"),
        "100_bytes.jpg": (good[:100], "truncated JPEG: no image header"),
        "text.jpg": (b"<html>404 not found</html>", foreign),
        "zeros.jpg": (b"\x00" * 5000, foreign),
        "gif.jpg": (as_format(photograph, "GIF", "P"), foreign),
        "tiff.jpg": (as_format(photograph, "TIFF"), foreign),
        "empty.jpg": (b"", "empty file"),
        "dangling.jpg": (None, "No such file or directory"),
        "no_tables.jpg": (good.replace(b"\xff\xdb", b"\xff\xfe"), refuses),
        "no_size.jpg": (with_size(good, 0, 0), "JPEG of size 0 x 0"),
        "bomb.jpg": (with_size(good, 9000, 12000), "12000 x 9000 pixels exceed the limit"),
        "bomb.png": (png(20_000, 20_000, 1, 0, b"\x00" * 2501 * 20_000), "20000 x 20000 pixels exceed the limit"),
        "half.png": (as_format(photograph, "PNG")[:5000], "truncated PNG: no end chunk"),
        "random_scan.jpg": (damaged_scan(good), "ok"),  # no decoder can know: only checksums do
        "cmyk.jpg": (jpeg(photograph.convert("CMYK")), "ok"),
        "gray.jpg": (jpeg(photograph.convert("L")), "ok"),
        "progressive.jpg": (jpeg(photograph, progressive=True), "ok"),
        "444.jpg": (jpeg(photograph, subsampling=0), "ok"),
        "turned.jpg": (jpeg(photograph, exif=exif), "ok"),
        "broken_exif.jpg": (jpeg(photograph, exif=b"Exif\x00\x00" + b"\xff" * 50), "ok"),
        "trailing.jpg": (good + b"\x00" * 1000, "ok"),
        "png.jpg": (as_format(photograph, "PNG"), "ok"),
        "rgba.png": (as_format(photograph, "PNG", "RGBA"), "ok"),
        "palette.png": (as_format(photograph, "PNG", "P"), "ok"),
        "rgb16.png": (png(40, 30, 16, 2, (b"\x00" + b"\x12\x34" * 120) * 30), "ok"),
        "gray16.png": (png(40, 30, 16, 0, (b"\x00" + b"\x80\x00" * 40) * 30), "ok"),
        "webp.jpg": (as_format(photograph, "WEBP"), "ok"),
        "bmp.jpg": (as_format(photograph, "BMP"), "ok"),
        "1x1.jpg": (jpeg(Image.new("RGB", (1, 1))), "ok"),
        "wide.jpg": (jpeg(Image.new("RGB", (6000, 10))), "ok"),
        "high.jpg": (jpeg(Image.new("RGB", (10, 6000))), "ok"),
    }

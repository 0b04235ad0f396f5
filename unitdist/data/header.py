"""Height and width of an encoded image from its first bytes, and a cheap test for cut-off files.

The geometry of an augmentation needs the size before anything is decoded; so do the refusal of decompression bombs
and of files that are no images. JPEG, PNG, WebP and BMP, told apart by their content and not by their name; a few
microseconds each.
"""

import struct

_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..SOF15 without DHT, JPG, DAC
_JPEG_BARE_MARKERS = frozenset((0x01, *range(0xD0, 0xD9)))  # TEM, RST0..7, SOI: no length follows


class UnreadableImage(Exception):
    """These bytes cannot be decoded; the text is the reason in a few words."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as stored, without turning by EXIF.

    Raises UnreadableImage for empty, cut-off or foreign bytes. A JPEG has to hold its end marker: libjpeg would only
    warn, and whether a decoder of a region notices would depend on the region.
    """
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg_size(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    if data[:2] == b"BM":
        return _bmp_size(data)
    raise UnreadableImage("not a JPEG, PNG, WebP or BMP image" if data else "empty file")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    position, end = 2, len(data)
    while position + 9 <= end:
        if data[position] != 0xFF:
            raise UnreadableImage("not a JPEG: broken segment")
        marker = data[position + 1]
        if marker in _JPEG_SIZE_MARKERS:
            height, width = struct.unpack_from(">HH", data, position + 5)
            if height == 0 or width == 0:
                raise UnreadableImage(f"JPEG of size {width} x {height}")
            if data.rfind(b"\xff\xd9", position) < 0:
                raise UnreadableImage("truncated JPEG: no end marker")
            return height, width
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _JPEG_BARE_MARKERS:
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise UnreadableImage("truncated JPEG: no image header")


def _png_size(data: bytes) -> tuple[int, int]:
    if len(data) < 24:
        raise UnreadableImage("truncated PNG: no image header")
    width, height = struct.unpack_from(">II", data, 16)
    if data.rfind(b"IEND") < 0:
        raise UnreadableImage("truncated PNG: no end chunk")
    return height, width


def _webp_size(data: bytes) -> tuple[int, int]:
    if len(data) < 30 or len(data) < 8 + struct.unpack_from("<I", data, 4)[0]:
        raise UnreadableImage("truncated WebP")
    if data[12:16] == b"VP8X":  # extended: 24-bit sizes less one
        return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little")
    if data[12:16] == b"VP8L":  # lossless: 14-bit sizes less one
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF


def _bmp_size(data: bytes) -> tuple[int, int]:
    if len(data) < 26 or len(data) < struct.unpack_from("<I", data, 2)[0]:
        raise UnreadableImage("truncated BMP")
    width, height = struct.unpack_from("<ii", data, 18)
    return abs(height), abs(width)


def image_note(data: bytes, file_name: str) -> str:
    """What is odd about a readable image: "cmyk", "png named .jpg", ..., or nothing."""
    suffix = file_name.rpartition(".")[2].lower()
    suffix = "jpg" if suffix == "jpeg" else suffix
    content = (
        "jpg"
        if data[:2] == b"\xff\xd8"
        else "png"
        if data[:4] == b"\x89PNG"
        else "bmp"
        if data[:2] == b"BM"
        else "webp"
    )
    if content != suffix:
        return f"{content} named .{suffix}"
    return "cmyk" if content == "jpg" and _jpeg_channels(data) == 4 else ""


def _jpeg_channels(data: bytes) -> int:
    position = 2
    while position + 9 < len(data):
        marker = data[position + 1]
        if marker in _JPEG_SIZE_MARKERS:
            return data[position + 9]
        bare = 1 if marker == 0xFF else 2 if marker in _JPEG_BARE_MARKERS else 0
        position += bare or 2 + struct.unpack_from(">H", data, position + 2)[0]
    return 0

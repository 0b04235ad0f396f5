"""Decode every image of a split once and write a manifest with sizes, checksums and verdicts.

The manifest DIR.tsv beside the folder is what data.source=manifest reads: images with a verdict other than ok are
left out of training. An interrupted scan continues where it was.
"""

import argparse
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from unitdist.data.header import UnreadableImage, image_note, image_size
from unitdist.data.index import ImageIndex, scan_image_folder
from unitdist.data.manifest import FILES_FORMAT, write_lines
from unitdist.errors import ConfigError
from unitdist.wording import counted, install_extra

if TYPE_CHECKING:
    from unitdist.data.dali_check import DecodeCheck

BATCH = 256

# The 23 images of ImageNet's training set that are no plain RGB or gray JPEGs; all of them decode.
IMAGENET_PNG = "n02105855_2933"
IMAGENET_CMYK = """n01739381_1309 n02077923_14822 n02447366_23489 n02492035_15739 n02747177_10752 n03018349_4028
n03062245_4620 n03347037_9675 n03467068_12171 n03529860_11437 n03544143_17228 n03633091_5218 n03710637_5125
n03961711_5286 n04033995_2932 n04258138_17003 n04264628_27969 n04336792_7448 n04371774_5854 n04596742_4225
n07583066_647 n13037406_4650""".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="split folder with one folder of images per class")
    parser.add_argument("--output", type=Path, help="manifest to write (default: FOLDER.tsv)")
    parser.add_argument("--threads", type=int, default=4, help="reading and decoding threads")
    parser.add_argument("--max-megapixels", type=int, default=64, help="larger images count as bad")


def check_batch(
    index: ImageIndex, ids: range, decoder: "DecodeCheck", pool: ThreadPoolExecutor, max_pixels: int
) -> list[str]:
    """The manifest's lines of some samples."""

    def read(sample_id: int) -> tuple[bytes, tuple[int, int], str]:
        try:
            data = index.read(sample_id)
        except OSError as error:
            return b"", (0, 0), error.strerror or str(error)
        try:
            height, width = image_size(data)
        except UnreadableImage as error:
            return data, (0, 0), str(error)
        too_large = f"{width} x {height} pixels exceed the limit" if height * width > max_pixels else "ok"
        return data, (height, width), too_large

    read_images = list(pool.map(read, ids))
    sound = [row for row, (_, _, verdict) in enumerate(read_images) if verdict == "ok"]
    decoded = dict(zip(sound, decoder.decodes([read_images[row][0] for row in sound]), strict=True))
    lines = []
    for row, (sample_id, (data, (height, width), verdict)) in enumerate(zip(ids, read_images, strict=True)):
        path = index.paths[sample_id]
        verdict = verdict if decoded.get(row, True) else "the decoder refuses it"
        note = image_note(data, path) if verdict == "ok" else ""
        fields = (path, index.labels[sample_id], len(data), height, width, f"{zlib.crc32(data):08x}", verdict, note)
        lines.append("\t".join(str(field).replace("\t", " ").replace("\n", " ") for field in fields))
    return lines


def finished_lines(part: Path, index: ImageIndex) -> list[str]:
    """Whole lines that an interrupted scan of the same list left; none when the list has changed."""
    if not part.is_file():
        return []
    lines = part.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    lines.pop()  # what stands after the last line's end is empty, or half a line
    same_list = lines[:1] == [index.content_hash]
    return lines[1:] if same_list else []


def decode_check(threads: int) -> "DecodeCheck":
    """DALI's decoder; the other verbs do without DALI. Raises ConfigError where it is not installed."""
    try:
        from unitdist.data.dali_check import DecodeCheck
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "nvidia":
            raise
        raise ConfigError(f"scan needs NVIDIA DALI: {install_extra('dali-cuda13', 'dali-cuda12')}") from None
    return DecodeCheck(threads)


def run(options: argparse.Namespace) -> int:
    if options.threads < 1 or options.max_megapixels < 1:
        raise ConfigError("--threads and --max-megapixels must be >= 1")
    decoder = decode_check(options.threads)
    index = scan_image_folder(options.folder)
    output = options.output or options.folder.with_name(options.folder.name + ".tsv")
    part = output.with_name(output.name + ".part")
    lines = finished_lines(part, index)
    part.write_text("".join(f"{line}\n" for line in [index.content_hash, *lines]), errors="surrogateescape")
    with (
        ThreadPoolExecutor(options.threads) as pool,
        open(part, "a", encoding="utf-8", errors="surrogateescape") as unfinished,
        tqdm(total=len(index), initial=len(lines), unit="img", disable=None) as bar,
    ):
        for start in range(len(lines), len(index), BATCH):
            ids = range(start, min(start + BATCH, len(index)))
            new = check_batch(index, ids, decoder, pool, options.max_megapixels * 1_000_000)
            unfinished.write("".join(f"{line}\n" for line in new))
            unfinished.flush()
            lines += new
            bar.update(len(new))
    write_lines(output, FILES_FORMAT, {"classes": list(index.class_to_idx)}, lines)
    part.unlink()
    print(report(options.folder, index, lines))
    print(f"manifest: {output}")
    return 0


def report(folder: Path, index: ImageIndex, lines: list[str]) -> str:
    """What a reader wants to know: every bad file with its reason, the oddities, the number of good ones."""
    rows = [line.split("\t") for line in lines]
    bad = [row for row in rows if row[6] != "ok"]
    text = [f"bad: {folder / row[0]} ({row[6]})" for row in bad]
    odd: dict[str, list[str]] = {}
    for row in rows:
        if row[7]:
            odd.setdefault(row[7], []).append(Path(row[0]).stem)
    for note, names in sorted(odd.items()):
        known = names == [IMAGENET_PNG] or sorted(names) == sorted(IMAGENET_CMYK)
        listed = (
            "exactly those known of ImageNet" if known else ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        )
        text.append(f"odd, but fine: {len(names)} {note} ({listed})")
    ignored = f", {counted(index.ignored, 'other file')} ignored" if index.ignored else ""
    text.append(
        f"{len(rows) - len(bad):,} good and {len(bad):,} bad images in {counted(len(index.class_to_idx), 'class', 'classes')}{ignored}"
    )
    return "\n".join(text)

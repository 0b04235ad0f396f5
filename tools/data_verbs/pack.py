"""Pack a split into WebDataset tars of about 1,000 images in seeded random order, with an index, and verify them.

The tars are what network storage likes: few large files, read from front to back. data.source=webdataset reads them.
An interrupted run continues with the tars that are missing; the same arguments give the same bytes.
"""

import argparse
import io
import json
import multiprocessing
import os
import tarfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from unitdist.data.index import ImageIndex, scan_image_folder
from unitdist.data.manifest import SHARDS_FORMAT, load_manifest, write_lines
from unitdist.data.order import epoch_order
from unitdist.data.shards import crc32_of, tar_entries
from unitdist.errors import ConfigError, DataError
from unitdist.wording import counted


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar to write: its path and the (absolute path, name in the tar, label) of its images."""

    path: Path
    images: list[tuple[str, str, int]]
    resize_shorter_px: int | None
    quality: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="split folder, or the .tsv manifest of a scan of it")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tars and index.tsv")
    parser.add_argument("--images-per-shard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the images' order")
    parser.add_argument("--resize-shorter", type=int, metavar="PX", help="shrink larger images to this shorter side")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality of images that are shrunk")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")


def encoded_image(path: str, resize_shorter_px: int | None, quality: int) -> bytes:
    """The file's bytes; shrunk and re-encoded (4:4:4 at the given quality) where its shorter side is larger."""
    data = Path(path).read_bytes()
    if resize_shorter_px is None:
        return data
    with Image.open(io.BytesIO(data)) as image:
        short = min(image.size)
        if short <= resize_shorter_px:
            return data
        size = tuple(resize_shorter_px * side // short for side in image.size)
        colours = image if image.mode in ("L", "RGB") else image.convert("RGB")
        shrunk = colours.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shrunk.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def write_shard(shard: Shard) -> None:
    """Write the tar under a temporary name, then its part of the index, each complete or not there."""
    temporary = shard.path.with_name(shard.path.name + ".tmp")
    with open(temporary, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for path, name, label in shard.images:
                data = encoded_image(path, shard.resize_shorter_px, shard.quality)
                stem = name.rpartition("/")[0] + "/" + Path(name).name.partition(".")[0]
                for member, content in ((name, data), (f"{stem}.cls", str(label).encode())):
                    info = tarfile.TarInfo(member)
                    info.size, info.mode = len(content), 0o644
                    archive.addfile(info, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, shard.path)


def shard_lines(number: int, shard: Shard) -> list[str]:
    """The index lines of a written tar, read back from the tar itself. Raises DataError when it is not as planned."""
    entries = tar_entries(shard.path)
    if [entry.name for entry in entries] != [name for _, name, _ in shard.images]:
        raise DataError(f"{shard.path} does not hold the planned images: remove it and pack again")
    lines = []
    for entry, (path, _, label) in zip(entries, shard.images, strict=True):
        crc = crc32_of(shard.path, entry.offset, entry.size)
        if shard.resize_shorter_px is None and crc != f"{zlib.crc32(Path(path).read_bytes()):08x}":
            raise DataError(f"{shard.path}: {entry.name} differs from {path}: remove the tar and pack again")
        lines.append(f"{number}\t{entry.offset}\t{entry.size}\t{label}\t{crc}\t{entry.name}")
    return lines


def write_and_verify(numbered: tuple[int, Shard]) -> list[str]:
    """What a worker does: write unless the tar is there already, then read it back."""
    number, shard = numbered
    if not shard.path.exists():
        write_shard(shard)
    return shard_lines(number, shard)


def member_names(index: ImageIndex) -> list[str]:
    """Names without dots before the suffix (WebDataset cuts keys at the first one), unique within the split."""
    names = []
    for path in index.paths:
        stem, _, suffix = path.rpartition(".")
        suffix = "jpg" if suffix.lower() in ("jpg", "jpeg") else suffix.lower()
        names.append(f"{stem.replace('.', '_')}.{suffix}")
    if len({name.rpartition(".")[0] for name in names}) != len(names):
        raise DataError(f"{index.root}: two images have the same name up to their suffix; rename one of them")
    return names


def plan(index: ImageIndex, options: argparse.Namespace) -> list[Shard]:
    """All tars in order."""
    names, order = member_names(index), epoch_order(len(index), options.seed, 0).tolist()
    shards = []
    for start in range(0, len(order), options.images_per_shard):
        ids = order[start : start + options.images_per_shard]
        images = [(index.name(i), names[i], int(index.labels[i])) for i in ids]
        path = options.output / f"{start // options.images_per_shard:06d}.tar"
        shards.append(
            Shard(path=path, images=images, resize_shorter_px=options.resize_shorter, quality=options.quality)
        )
    return shards


def require_same_arguments(index: ImageIndex, options: argparse.Namespace) -> None:
    """Tars of another run must not mix with these: the arguments are kept beside them."""
    wanted = {
        "content": index.content_hash,
        "images_per_shard": options.images_per_shard,
        "seed": options.seed,
        "resize_shorter": options.resize_shorter,
        "quality": options.quality if options.resize_shorter else None,
    }
    record = options.output / "pack.json"
    if record.exists():
        found = json.loads(record.read_text())
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            raise ConfigError(f"{options.output} was packed with other {', '.join(differing)}: give another --output")
    record.write_text(json.dumps(wanted) + "\n")


def run(options: argparse.Namespace) -> int:
    if options.images_per_shard < 1 or options.workers < 1 or not 1 <= options.quality <= 100:
        raise ConfigError("--images-per-shard and --workers must be >= 1, --quality in 1..100")
    is_manifest = options.source.suffix == ".tsv"
    index = (
        load_manifest(options.source, options.source.with_suffix(""))
        if is_manifest
        else scan_image_folder(options.source)
    )
    options.output.mkdir(parents=True, exist_ok=True)
    require_same_arguments(index, options)
    shards = plan(index, options)
    lines: list[str] = []
    context = multiprocessing.get_context("forkserver")
    with (
        ProcessPoolExecutor(options.workers, mp_context=context) as pool,
        tqdm(total=len(index), unit="img", disable=None) as bar,
    ):
        for new in pool.map(write_and_verify, enumerate(shards)):
            lines += new
            bar.update(len(new))
    classes = list(index.class_to_idx)
    (options.output / "classes.txt").write_text("".join(f"{name}\n" for name in classes), errors="surrogateescape")
    header = {"kind": "webdataset", "classes": classes, "shards": [shard.path.name for shard in shards]}
    write_lines(options.output / "index.tsv", SHARDS_FORMAT, header, lines)
    size = sum(shard.path.stat().st_size for shard in shards)
    print(
        f"{counted(len(lines), 'image')} in {counted(len(shards), 'tar')} "
        f"({size / 2**20:,.1f} MiB), verified; index: {options.output / 'index.tsv'}"
    )
    return 0

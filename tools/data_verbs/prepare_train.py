"""Unpack ImageNet's training download, a tar of one tar per class, into one folder per class.

Only plain file names are taken from the archives. An interrupted run continues: a class is unpacked under a
temporary name and renamed when it is complete.
"""

import argparse
import os
import shutil
import tarfile
from pathlib import Path

from tqdm import tqdm

from unitdist.errors import ConfigError, DataError
from unitdist.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, help="ILSVRC2012_img_train.tar")
    parser.add_argument("--output", type=Path, required=True, help="folder for the class folders, e.g. imagenet/train")


def plain_name(name: str, archive: Path) -> str:
    """The name when it is one path component. Raises DataError otherwise: an archive may come from anybody."""
    name = name.removeprefix("./")
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise DataError(f"{archive} holds {name!r}, expected plain file names: refused")
    return name


def unpack_class(archive: Path, outer: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> int:
    """Write the images of one inner tar to folder; their number."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    inner_file = outer.extractfile(member)
    assert inner_file is not None
    count = 0
    with inner_file, tarfile.open(fileobj=inner_file, mode="r:") as inner:
        for image in inner:
            if image.isfile():
                content = inner.extractfile(image)
                assert content is not None
                with content, open(temporary / plain_name(image.name, archive), "wb") as file:
                    shutil.copyfileobj(content, file)
                count += 1
    os.replace(temporary, folder)
    return count


def run(options: argparse.Namespace) -> int:
    if not options.archive.is_file():
        raise ConfigError(f"no such file: {options.archive}")
    classes = images = 0
    try:
        size = options.archive.stat().st_size
        with (
            tarfile.open(options.archive, "r:") as outer,
            tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar,
        ):
            for member in outer:
                name = plain_name(member.name, options.archive)
                if not member.isfile() or not name.endswith(".tar"):
                    raise DataError(f"{options.archive} holds {name!r}, expected one tar per class")
                folder = options.output / name.removesuffix(".tar")
                classes += 1
                if folder.is_dir():
                    images += sum(1 for _ in folder.iterdir())
                else:
                    images += unpack_class(options.archive, outer, member, folder)
                bar.update(member.offset_data + member.size - bar.n)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{options.archive} is damaged or cut off: {error}") from error
    print(f"{counted(images, 'image')} in {counted(classes, 'class folder')} under {options.output}")
    return 0

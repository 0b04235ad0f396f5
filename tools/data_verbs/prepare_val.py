"""Sort ImageNet's flat validation set into one folder per class.

Images: the download ILSVRC2012_img_val.tar, or a folder of its files. Labels: the devkit ILSVRC2012_devkit_t12.tar.gz
(or its unpacked folder), or a CSV file with image and class in its first two columns (LOC_val_solution.csv).
"""

import argparse
import csv
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from data_verbs.prepare_train import plain_name
from unitdist.data.index import IMAGE_SUFFIXES
from unitdist.errors import ConfigError, DataError
from unitdist.wording import counted

GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, help="ILSVRC2012_img_val.tar, or a folder with its files")
    parser.add_argument("--labels", type=Path, required=True, help="devkit (.tar.gz or folder), or CSV file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the class folders, e.g. imagenet/val")
    parser.add_argument("--copy", action="store_true", help="copy files of a folder instead of hard-linking them")


def devkit_file(devkit: Path, name: str) -> bytes:
    """One file of the devkit, packed or unpacked."""
    if devkit.is_dir():
        found = [path for path in (devkit / name, *devkit.glob(f"*/{name}")) if path.is_file()]
        if not found:
            raise ConfigError(f"--labels: {devkit} holds no {name}")
        return found[0].read_bytes()
    try:
        with tarfile.open(devkit, "r:*") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(name):
                    content = archive.extractfile(member)
                    assert content is not None
                    return content.read()
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"--labels: {devkit} is neither a CSV file like Kaggle's LOC_val_solution.csv nor a readable tar file like the "
            f"devkit ILSVRC2012_devkit_t12.tar.gz ({str(error).partition(chr(10))[0].rstrip(':- ')})"
        ) from error
    raise ConfigError(f"--labels: {devkit} holds no {name}")


def devkit_classes(devkit: Path) -> list[str]:
    """The class (WordNet id, n01440764) of validation image 1, 2, 3, ..."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise ConfigError("--labels: reading the devkit's meta.mat needs scipy: pip install scipy") from None
    synsets = loadmat(io.BytesIO(devkit_file(devkit, META)), squeeze_me=True)["synsets"]
    name_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    numbers = devkit_file(devkit, GROUND_TRUTH).split()
    unknown = sorted({int(number) for number in numbers} - set(name_of))
    if unknown:
        raise DataError(f"--labels: {devkit} has no class for the numbers {unknown[:5]}")
    return [name_of[int(number)] for number in numbers]


def csv_classes(path: Path) -> dict[str, str]:
    """image stem -> class: the first two columns, the second up to its first blank (Kaggle lists boxes after it)."""
    classes = {}
    with open(path, newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if len(row) < 2 or not row[0] or not row[1].split():
                raise DataError(f"--labels: {path}:{number}: expected image,class, got {','.join(row)!r}")
            classes[Path(row[0]).stem] = plain_name(row[1].split()[0], path)
    return classes


def class_of_images(labels: Path, names: list[str]) -> dict[str, str]:
    """image name -> class for all of the names. Raises DataError where they do not fit the labels."""
    if not labels.exists():
        raise ConfigError(f"--labels: no such file or folder: {labels}")
    if labels.suffix == ".csv":
        by_stem = csv_classes(labels)
        unknown = [name for name in names if Path(name).stem not in by_stem]
        if unknown:
            raise DataError(f"--labels: {labels} says nothing about {len(unknown)} images, first {unknown[0]}")
        return {name: by_stem[Path(name).stem] for name in names}
    classes = devkit_classes(labels)
    if len(classes) != len(names):
        raise DataError(f"--labels: {labels} has {len(classes):,} labels for {len(names):,} images")
    return dict(zip(sorted(names), classes, strict=True))


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def place_from_folder(folder: Path, classes: dict[str, str], output: Path, copy: bool) -> Iterator[None]:
    for name, class_name in classes.items():
        target = output / class_name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            if copy:
                shutil.copyfile(folder / name, target)
            else:
                os.link(folder / name, target)
        yield


def place_from_tar(path: Path, classes: dict[str, str], output: Path) -> Iterator[None]:
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if not member.isfile():
                continue
            name = plain_name(member.name, path)
            target = output / classes[name] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.stat().st_size != member.size:
                content = archive.extractfile(member)
                assert content is not None
                with content, open(target, "wb") as file:
                    shutil.copyfileobj(content, file)
            yield


def run(options: argparse.Namespace) -> int:
    images: Path = options.images
    if images.is_dir():
        names = sorted(name for name in os.listdir(images) if is_image(name) and (images / name).is_file())
    elif images.is_file():
        try:
            with tarfile.open(images, "r:") as archive:
                names = [plain_name(member.name, images) for member in archive if member.isfile()]
        except tarfile.TarError as error:
            raise DataError(f"{images} is no uncompressed tar file: {error}") from error
    else:
        raise ConfigError(f"no such file or folder: {images}")
    if not names:
        raise DataError(f"{images} holds no images")
    classes = class_of_images(options.labels, names)
    placed = (
        place_from_folder(images, classes, options.output, options.copy)
        if images.is_dir()
        else place_from_tar(images, classes, options.output)
    )
    for _ in tqdm(placed, total=len(names), unit="img", disable=None):
        pass
    print(
        f"{counted(len(names), 'image')} in {counted(len(set(classes.values())), 'class folder')} under {options.output}"
    )
    return 0

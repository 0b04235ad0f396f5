"""The data folder: there, the same classes on both sides, no class empty, and a sample that decodes."""

import io
import os
from pathlib import Path

from unitdist.doctor.finding import Finding, fault, note, ok
from unitdist.errors import DataError, UnitdistError
from unitdist.wording import counted

AREA = "data"


def check_data(
    folder: Path | None, *, train_split: str = "train", val_split: str = "val", image_folder: bool = True
) -> Finding:
    """Looks at every class folder of both splits and decodes one image of each split; not a full scan.

    `image_folder`: False where the config's data are something else, which is only looked for.
    """
    if folder is None:
        return note(AREA, "not looked at", "--data DIR, or --config FILE with data.path")
    try:
        if not folder.exists():
            return fault(
                AREA,
                f"no such folder: {folder}",
                "give the folder that holds the splits; is the disk mounted on this node?",
            )
        if not image_folder:
            return note(
                AREA, f"{folder} is there; only folders of images are looked into here (python tools/data.py scan)"
            )
        return _check_splits(folder, train_split, val_split)
    except ImportError as error:  # NumPy or Pillow
        return fault(AREA, f"{folder} cannot be looked into: {error}", "pip install -c constraints.txt -e .")
    except UnitdistError as error:
        return fault(
            AREA,
            str(error),
            "docs/data.md shows the layout: SPLIT/<class>/*.JPEG; python tools/data.py prepares and scans it",
        )
    except OSError as error:
        return fault(
            AREA, f"cannot read {error.filename}: {error.strerror}", "check permissions, the mount and the disk (dmesg)"
        )


def _check_splits(folder: Path, train_split: str, val_split: str) -> Finding:
    """Raises DataError, ConfigError, OSError."""
    from unitdist.data.index import class_names, require_same_classes

    splits = {name: folder / name for name in (train_split, val_split)}
    classes = {name: class_names(path) for name, path in splits.items()}
    for name, path in splits.items():
        if not classes[name]:
            raise DataError(f"{path} holds no class folders")
    require_same_classes(classes[train_split], classes[val_split], train=splits[train_split], val=splits[val_split])
    samples = {}
    for name, path in splits.items():
        firsts = {one: first_image(path / one) for one in classes[name]}
        empty = [one for one, first in firsts.items() if first is None]
        if empty:
            raise DataError(f"{path}: {len(empty)} of {len(firsts)} classes hold no image, {empty[0]} for one")
        samples[name] = next(first for first in firsts.values() if first is not None)
    for path in samples.values():
        decode(path)
    return ok(
        AREA,
        f"{folder}: {counted(len(classes[train_split]), 'class', 'classes')} in {train_split} and {val_split}, a sample of each decodes",
    )


def first_image(folder: Path) -> Path | None:
    """Some image in `folder`, without listing all of it. Raises OSError."""
    from unitdist.data.index import IMAGE_SUFFIXES

    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith("."):
                return Path(entry.path)
    return None


def decode(path: Path) -> None:
    """Every pixel, with Pillow. Raises OSError with the file's name, DataError for bytes that are no image."""
    from PIL import Image, UnidentifiedImageError

    content = path.read_bytes()
    try:
        Image.open(io.BytesIO(content)).convert("RGB").load()
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"{path} does not decode ({error})") from None

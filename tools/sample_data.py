"""Sample data: real JPEG photographs cut from the pictures in scikit-image's wheel, without any download.

Each photograph is one class. It is divided into a grid of cells; the cells (column + 2 * row) % 4 == 1 belong to
the validation set and no two of them touch, all other cells to the training set. Every image is a crop inside ONE
cell, enlarged to about 500 x 375, so no pixel of a validation image occurs in a training image.

The bytes depend on the seed, the class, the split and the image's number only (and on Pillow's version), so a
larger set holds the smaller one.
"""

import hashlib
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from unitdist.wording import install_extra

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "handwriting": "text.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "print": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "stars": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
}
RETINA_BOX = (206, 206, 1206, 1206)  # the square inside the round photograph: its black corners show nothing
CELL_PX = 128


def photograph_folder() -> Path:
    """Folder of the pictures inside the installed scikit-image, found without importing it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"scikit-image is not installed: {install_extra('demo')}")
    return Path(spec.origin).parent / "data"


def grid_cells(width_px: int, height_px: int) -> dict[str, list[tuple[int, int, int, int]]]:
    """Boxes (left, top, right, bottom) of the training and validation cells of a photograph."""
    columns = min(6, max(4, round(width_px / CELL_PX)))
    rows = min(6, max(2, round(height_px / CELL_PX)))
    cells: dict[str, list[tuple[int, int, int, int]]] = {"train": [], "val": []}
    for row in range(rows):
        for column in range(columns):
            left, right = column * width_px // columns, (column + 1) * width_px // columns
            top, bottom = row * height_px // rows, (row + 1) * height_px // rows
            cells["val" if (column + 2 * row) % 4 == 1 else "train"].append((left, top, right, bottom))
    return cells


def image_size_px(draw: random.Random) -> tuple[int, int]:
    """Width and height: 60 % are 500 x 375, the rest portrait, square or landscape between 340 and 640."""
    if draw.random() < 0.6:
        return 500, 375
    return 340 + int(draw.random() * 301), 340 + int(draw.random() * 201)


def cut_image(photograph: Image.Image, cell: tuple[int, int, int, int], draw: random.Random) -> Image.Image:
    """One crop inside the cell with the aspect ratio of its final size, 75 to 100 % of the largest that fits."""
    width, height = image_size_px(draw)
    left, top, right, bottom = cell
    share = (0.75 + 0.25 * draw.random()) * min((right - left) / width, (bottom - top) / height)
    crop_width, crop_height = share * width, share * height
    x = left + draw.random() * (right - left - crop_width)
    y = top + draw.random() * (bottom - top - crop_height)
    # The crop is cut on whole pixels first: a resize with a box would let its kernel look outside the cell.
    box = (round(x), round(y), max(round(x) + 1, int(x + crop_width)), max(round(y) + 1, int(y + crop_height)))
    return photograph.crop(box).resize((width, height), Image.Resampling.BICUBIC)


def open_photograph(file_name: str) -> Image.Image:
    """The photograph in its own mode, RGB or L."""
    with Image.open(photograph_folder() / file_name) as opened:
        opened.load()
        return opened.crop(RETINA_BOX) if file_name == "retina.jpg" else opened.copy()


def make_sample_data(
    output: Path,
    *,
    seed: int,
    train_per_class: int,
    val_per_class: int,
    report: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Write output/{train,val}/<class>/<class>_<number>.jpg and output/manifest.json.

    Returns {relative path: SHA-256 in hex}, which is also the manifest's "files". Raises FileExistsError when
    output already holds a train or val folder: files of two runs must not mix.
    """
    for split in ("train", "val"):
        if (output / split).exists():
            raise FileExistsError(f"{output / split} is there already: give another --output or remove it")
    checksums: dict[str, str] = {}
    for class_name, file_name in PHOTOGRAPHS.items():
        photograph = open_photograph(file_name)
        cells = grid_cells(*photograph.size)
        for split, count in (("train", train_per_class), ("val", val_per_class)):
            folder = output / split / class_name
            folder.mkdir(parents=True)
            for number in range(count):
                draw = random.Random(f"{seed}/{class_name}/{split}/{number}")
                image = cut_image(photograph, cells[split][number % len(cells[split])], draw)
                path = folder / f"{class_name}_{number:04d}.jpg"
                image.save(path, quality=86 + int(draw.random() * 10), subsampling=0 if draw.random() < 0.1 else 2)
                checksums[path.relative_to(output).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        if report:
            report(f"{class_name}: {train_per_class} + {val_per_class} images from {file_name}")
    manifest = {"seed": seed, "classes": sorted(PHOTOGRAPHS), "files": checksums}
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return checksums

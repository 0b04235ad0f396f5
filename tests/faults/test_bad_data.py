"""Data that is not what it has to be, and settings that do not fit it: one line with the cause, the place and the remedy."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.launching import torchrun, train
from tests.faults.running import CONFIG, complaint
from unitdist.data.index import scan_image_folder
from unitdist.data.order import epoch_order


def refusal(code: int, data: Path, folder: Path, *changes: str) -> str:
    return complaint(code, "--config", str(CONFIG), f"data.path={data}", f"run.folder={folder / 'runs'}", *changes)


@pytest.fixture
def data(sample_data: Path, tmp_path: Path) -> Path:
    """A copy of the sample data that the test may spoil."""
    return Path(shutil.copytree(sample_data, tmp_path / "data"))


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").write_text("no folder")
    message = refusal(2, tmp_path / "data", tmp_path)
    assert message == (
        f"data.path: {tmp_path / 'data' / 'train'} is a file, expected a folder with one folder of images per class"
    )


def test_folder_that_may_not_be_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def forbidden(path: Path):
        if Path(path) == data / "train" / "moon":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert refusal(2, data, tmp_path) == f"data.path: cannot read {data / 'train' / 'moon'}: Permission denied"


@pytest.mark.parametrize(("folders", "count"), [((), 0), (("cat", "moon"), 2)])
def test_folder_without_images(tmp_path: Path, folders: tuple[str, ...], count: int) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name in folders:
        (tmp_path / "data" / "train" / name).mkdir()
    message = refusal(1, tmp_path / "data", tmp_path)
    assert message.startswith(
        f"{tmp_path / 'data' / 'train'}: holds 0 images in {count} class folders (looked for .jpg .jpeg"
    )


def test_several_empty_classes_are_listed(data: Path, tmp_path: Path) -> None:
    for name in ("zebra", "aard", "newt"):
        (data / "train" / name).mkdir()
    assert refusal(1, data, tmp_path).endswith("3 of 19 classes hold no image: aard, newt, zebra")


def test_classes_of_training_and_validation_differ(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "val" / "moon")
    message = refusal(1, data, tmp_path)
    assert message == (f"the classes of training and validation differ (16 against 15): {data / 'val'} lacks moon")


@pytest.mark.parametrize("place", ["", "cat/deeper"])
def test_images_outside_class_folders(data: Path, tmp_path: Path, place: str) -> None:
    target = data / "train" / place
    target.mkdir(exist_ok=True)
    shutil.copy(data / "val" / "cat" / "cat_0000.jpg", target / "stray.jpg")
    message = refusal(1, data, tmp_path)
    first = f"{place}/stray.jpg".lstrip("/")
    assert message.startswith(
        f"{data / 'train'}: 1 image outside folder/<class>/ (first: {first}); move what lies there"
    )
    assert "prepare-val" in message


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def bomb(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"\xff\xc0") + 5
    path.write_bytes(content[:at] + struct.pack(">HH", 9000, 12000) + content[at + 4 :])


def vanished(path: Path) -> None:
    """Listed, but not there when it is read."""
    path.unlink()
    path.symlink_to("nowhere.jpg")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "truncated JPEG: no end marker"),
        (emptied, "empty file"),
        (bomb, "12000 x 9000 pixels exceed data.max_image_megapixels"),
        (vanished, "lost access, No such file or directory, 3 retries"),
    ],
)
def test_image_that_cannot_be_read(data: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    index = scan_image_folder(data / "train")
    victim = data / "train" / index.paths[epoch_order(len(index), 3, 0)[0]]  # in the first step of small.yaml's seed
    damage(victim)
    message = refusal(1, data, tmp_path)
    assert message == (f"unreadable image {victim} ({reason}); repair or remove it, or set data.on_broken=replace")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "data.global_batch_size: must be >= 1, got 0"),
        ("-4", "data.global_batch_size: must be >= 1, got -4"),
        ("many", "data.global_batch_size: expected a whole number, got 'many'"),
    ],
)
def test_batch_that_is_no_positive_number(tmp_path: Path, value: str, message: str) -> None:
    assert refusal(2, tmp_path, tmp_path, f"data.global_batch_size={value}") == message


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ("[200, 256]", "evaluation.scales_px: 200 is smaller than evaluation.crop_px: 224"),
        ("[0, 224]", "evaluation.scales_px: 0 is smaller than evaluation.crop_px: 224"),
        ("[256, 224]", "evaluation.scales_px: must be increasing sides, got [256, 224]"),
        ("[]", "evaluation.scales_px: must be increasing sides, got []"),
    ],
)
def test_evaluation_scales_that_cannot_be(tmp_path: Path, scales: str, message: str) -> None:
    assert refusal(2, tmp_path, tmp_path, f"evaluation.scales_px={scales}") == message


def test_fewer_images_than_ranks_is_said_by_one_rank(data: Path, tmp_path: Path) -> None:
    for name in sorted(path.name for path in (data / "train").iterdir())[1:]:
        shutil.rmtree(data / "train" / name)
        shutil.rmtree(data / "val" / name)
    for path in sorted((data / "train").glob("*/*"))[1:]:
        path.unlink()
    done = train(torchrun(2), "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path / 'runs'}")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("unitdist [rank ")]
    assert lines == ["unitdist [rank 0]: error: 1 training image cannot be split over 2 ranks"]

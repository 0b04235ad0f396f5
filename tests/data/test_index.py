"""index.py: the labels of torchvision's ImageFolder, and a message for everything that is not as it should be."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from unitdist.data.index import ImageIndex, class_names, require_same_classes, scan_image_folder
from unitdist.errors import ConfigError, DataError


def make_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_samples_and_labels_are_those_of_torchvision(sample_data: Path) -> None:
    index, reference = scan_image_folder(sample_data / "train"), ImageFolder(str(sample_data / "train"))
    assert [(index.name(i), int(index.labels[i])) for i in range(len(index))] == reference.samples
    assert index.class_to_idx == reference.class_to_idx
    assert index.read(5) == Path(index.name(5)).read_bytes()


def test_hidden_and_other_files_are_ignored_and_counted(tmp_path: Path) -> None:
    make_files(tmp_path, "a/1.JPEG", "a/.hidden.jpg", "a/notes.txt", "b/2.png", "README", ".git/x.jpg", "b/3.wav")
    index = scan_image_folder(tmp_path)
    assert index.paths == ["a/1.JPEG", "b/2.png"]
    assert index.ignored == 4


def test_missing_folder_and_file_instead_of_folder_are_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"data.path: no such folder: {tmp_path / 'none'}")):
        scan_image_folder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file, expected a folder with one folder of images per class"):
        scan_image_folder(tmp_path / "file")


def test_folder_without_images(tmp_path: Path) -> None:
    make_files(tmp_path, "a/x.txt")
    with pytest.raises(DataError, match=r"holds 0 images in 1 class folder \(looked for .jpg .jpeg .png"):
        scan_image_folder(tmp_path)


def test_empty_classes_are_named(tmp_path: Path) -> None:
    make_files(tmp_path, "a/1.jpg", "c/3.jpg")
    for name in ("b", "d", "e"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="3 of 5 classes hold no image: b, d, e$"):
        scan_image_folder(tmp_path)


@pytest.mark.parametrize("stray", ["top.jpg", "a/deeper/2.jpg"])
def test_images_outside_class_folders_are_refused(tmp_path: Path, stray: str) -> None:
    make_files(tmp_path, "a/1.jpg", stray)
    with pytest.raises(DataError, match=rf"1 image outside folder/<class>/ \(first: {stray}\).*prepare-val"):
        scan_image_folder(tmp_path)


def test_different_classes_of_the_splits_are_named() -> None:
    with pytest.raises(DataError, match=r"\(3 against 3\): .*val lacks n2; .*train lacks n9$"):
        require_same_classes(["n1", "n2", "n3"], ["n1", "n3", "n9"], train=Path("train"), val=Path("val"))
    require_same_classes(["n1"], ["n1"], train=Path("train"), val=Path("val"))


def test_content_hash_changes_with_paths_and_labels(tmp_path: Path) -> None:
    def hash_of(paths: list[str], labels: list[int]) -> str:
        return ImageIndex(root=tmp_path, paths=paths, labels=np.array(labels), class_to_idx={}).content_hash

    assert hash_of(["a", "b"], [0, 1]) == hash_of(["a", "b"], [0, 1])
    assert len({hash_of(["a", "b"], [0, 1]), hash_of(["a", "c"], [0, 1]), hash_of(["a", "b"], [0, 0])}) == 3


def test_class_names_skip_hidden_folders(tmp_path: Path) -> None:
    make_files(tmp_path, "b/1.jpg", ".cache/1.jpg", "a/1.jpg")
    assert class_names(tmp_path) == ["a", "b"]


LISTING = """
import sys, time
from pathlib import Path
from unitdist.data.index import scan_image_folder
began = time.process_time()
files = len(scan_image_folder(Path(sys.argv[1])))
print(files, time.process_time() - began)
"""


def test_twenty_thousand_files_are_listed_in_a_second(tmp_path: Path) -> None:
    """In a process of its own: this one's time includes threads that other tests left, and a collector with all their objects."""
    for name in range(20):
        folder = tmp_path / f"class_{name:02d}"
        folder.mkdir()
        for image in range(1000):
            (folder / f"{image}.jpg").touch()
    command = [sys.executable, "-c", LISTING, str(tmp_path)]
    files, seconds = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    assert (int(files), float(seconds) < 1) == (20_000, True), seconds

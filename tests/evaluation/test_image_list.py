import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.image_list import ImageList, list_images, require_same_labels
from unitdist.data.index import ImageIndex
from unitdist.errors import ConfigError, DataError


def test_names_labels_and_sizes_of_a_class_folder(small_val: Path, small_classes: dict[str, int]) -> None:
    images = list_images(small_val)
    assert len(images) == 34
    assert images.class_to_idx == small_classes
    for name, label, (height, width) in zip(images.names, images.labels_n, images.shapes, strict=True):
        assert small_classes[Path(name).parent.name] == label
        with Image.open(small_val / name) as image:
            assert (image.height, image.width) == (height, width)


def test_a_data_set_folder_stands_for_its_validation_split(sample_data: Path) -> None:
    assert list_images(sample_data).root == sample_data / "val"
    assert list_images(sample_data, val_split="train").root == sample_data / "train"


def test_a_class_named_val_is_no_split(tmp_path: Path, small_val: Path) -> None:
    image = next(small_val.rglob("*.jpg"))
    for name in ("val", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(image, tmp_path / name / "image.jpg")
    assert list_images(tmp_path, class_to_idx={"other": 0, "val": 1}).names == ("other/image.jpg", "val/image.jpg")


def flatten(small_val: Path, folder: Path) -> dict[str, str]:
    """Copies all images into one folder; returns file name -> class."""
    class_of = {}
    for image in small_val.rglob("*.jpg"):
        name = f"{image.parent.name}-{image.name}"
        shutil.copy(image, folder / name)
        class_of[name] = image.parent.name
    return class_of


def test_a_flat_folder_is_explained(tmp_path: Path, small_val: Path) -> None:
    class_of = flatten(small_val, tmp_path)
    message = rf"is flat: 34 images \(first: {min(class_of)}\) without class folders. Give --labels FILE with one `image class` line"
    with pytest.raises(DataError, match=message):
        list_images(tmp_path)


@pytest.mark.parametrize("form", ["{name} {label}", "{name},{label},x", "{stem}\t{label}"])
def test_a_flat_folder_with_class_names(tmp_path: Path, small_val: Path, small_classes: dict[str, int], form: str) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    class_of = flatten(small_val, folder)
    lines = [form.format(name=name, stem=Path(name).stem, label=label) for name, label in class_of.items()]
    header = ["ImageId,PredictionString"] if "," in form else []
    (tmp_path / "labels.txt").write_text("\n".join(header + lines))
    images = list_images(folder, labels_file=tmp_path / "labels.txt", class_to_idx=small_classes)
    assert images.names == tuple(sorted(class_of))
    assert images.labels_n.tolist() == [small_classes[class_of[name]] for name in images.names]


def test_a_flat_folder_with_numbers(tmp_path: Path, small_val: Path, small_classes: dict[str, int]) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    class_of = flatten(small_val, folder)
    (tmp_path / "labels.txt").write_text("\n".join(f"{name} {small_classes[label]}" for name, label in class_of.items()))
    images = list_images(folder, labels_file=tmp_path / "labels.txt", class_to_idx=small_classes)
    assert images.labels_n.tolist() == [small_classes[class_of[name]] for name in images.names]
    assert images.class_to_idx == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg cat\n", "names 1 of 2 images in .*; first without a label: b.jpg"),
        ("a.jpg cat\nb.jpg cat\nc.jpg cat\n", "labels.txt:3: there is no image c.jpg"),
        ("a.jpg cat\nb.jpg cat\na.jpg dog\n", "labels.txt:3: a.jpg is named twice"),
        ("a.jpg cat\nb.jpg\n", "labels.txt:2: expected `image label`"),
        ("a.jpg cat\nb.jpg cow\n", "class 'cow' was not in the training"),
    ],
)
def test_a_labels_file_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        list_images(folder, labels_file=tmp_path / "labels.txt", class_to_idx={"cat": 0, "dog": 1})


def test_a_missing_labels_file_is_refused(tmp_path: Path, small_val: Path) -> None:
    flatten(small_val, tmp_path)
    with pytest.raises(ConfigError, match="--labels: cannot read .*nowhere.txt"):
        list_images(tmp_path, labels_file=tmp_path / "nowhere.txt")


def test_missing_file_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data: .*nowhere does not exist"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file, not a folder"):
        list_images(tmp_path / "file")
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="holds 0 images"):
        list_images(tmp_path)


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=f"cannot read {tmp_path}: Permission denied"):
        list_images(tmp_path)


def test_an_unreadable_header_is_counted_with_its_name(tmp_path: Path, small_val: Path) -> None:
    shutil.copytree(small_val, tmp_path / "images")
    broken = sorted((tmp_path / "images").rglob("*.jpg"))[5]
    broken.write_bytes(b"no image")
    images = list_images(tmp_path / "images")
    assert {images.names[image_id] for image_id in images.broken} == {f"{broken.parent.name}/{broken.name}"}
    assert images.shapes[5] == (0, 0)


def build_list(class_to_idx: dict[str, int], labels: list[int]) -> ImageList:
    names = ["a"] * len(labels)
    return ImageList(
        source=ImageIndex(root=Path("data"), paths=names, labels=np.array(labels), class_to_idx=class_to_idx),
        root=Path("data"),
        names=tuple(names),
        labels_n=np.array(labels),
        shapes=((1, 1),) * len(labels),
        class_to_idx=class_to_idx,
        broken={},
    )


def test_the_first_difference_of_the_label_maps_is_named() -> None:
    images = build_list({"ant": 0, "bee": 1, "cat": 2}, [0, 1, 2])
    require_same_labels(images, {"ant": 0, "bee": 1, "cat": 2}, 3)
    with pytest.raises(DataError, match="'bee' is label 2 in the checkpoint, label 1 in the data"):
        require_same_labels(images, {"ant": 0, "cat": 1, "bee": 2}, 3)
    with pytest.raises(DataError, match=r"'bee' is no such class in the checkpoint, label 1 in the data \(2 against 3 classes\)"):
        require_same_labels(images, {"ant": 0, "cat": 1}, 2)


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(DataError, match="the network has 1000 outputs, data has 2 classes"):
        require_same_labels(build_list({"ant": 0, "bee": 1}, [0, 1]), None, 1000)
    with pytest.raises(DataError, match="labels go from 0 to 7, the network has 5 outputs"):
        require_same_labels(build_list({}, [0, 7]), None, 5)

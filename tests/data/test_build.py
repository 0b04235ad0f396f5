"""build.py: each data set with its loader, and the user's errors before the first batch."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unitdist.config import DataConfig
from unitdist.data.batch import Loader
from unitdist.errors import ConfigError, DataError

MakeConfig = Callable[..., DataConfig]
BuildLoader = Callable[..., Loader]


def test_no_path_and_missing_folder_are_the_users_error(small_config: MakeConfig, build_loader: BuildLoader) -> None:
    with pytest.raises(ConfigError, match="^data.path: give the data set's folder"):
        build_loader(small_config(path=""))
    with pytest.raises(ConfigError, match="^data.path: no such folder: /nowhere/train$"):
        build_loader(small_config(path="/nowhere"))
    with pytest.raises(ConfigError, match="^data.path: no such folder: /nowhere/val$"):
        build_loader(small_config(path="/nowhere"), training=False)


def test_batch_that_the_set_cannot_fill_once(small_config: MakeConfig, build_loader: BuildLoader) -> None:
    with pytest.raises(ConfigError, match="0 steps per epoch: 192 training images, 2 ranks x 97 images; lower it"):
        build_loader(small_config(), size=2, batch=97)
    with pytest.raises(ConfigError, match="192 training images cannot be split over 193 ranks"):
        build_loader(small_config(), size=193, batch=1)


def test_validation_set_may_be_smaller_than_the_world(small_config: MakeConfig, build_loader: BuildLoader) -> None:
    loader = build_loader(small_config(), rank=99, size=100, batch=1, training=False)
    batch = next(iter(loader.iterate(0)))
    assert loader.batches_per_epoch == 1 and batch.valid.tolist() == [False]


def test_splits_with_different_classes(
    sample_data: Path, tmp_path: Path, small_config: MakeConfig, build_loader: BuildLoader
) -> None:
    shutil.copytree(sample_data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "moon")
    with pytest.raises(DataError, match=r"training and validation differ \(16 against 15\): .*val lacks moon$"):
        build_loader(small_config(path=str(tmp_path / "data")), training=False)


def test_missing_dali_is_said_and_never_replaced_in_silence(
    small_config: MakeConfig, build_loader: BuildLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "unitdist.data.dali_loader", raising=False)
    monkeypatch.delitem(sys.modules, "unitdist.data.dali_graph", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(
        ConfigError,
        match=r"^data.loader: dali needs NVIDIA DALI: pip install -c constraints.txt -e '\.\[dali-cuda13\]'",
    ):
        build_loader(small_config())


def test_fingerprint_is_that_of_the_data_and_not_of_the_world(
    small_config: MakeConfig, build_loader: BuildLoader
) -> None:
    reference = build_loader(small_config()).fingerprint()
    assert reference == build_loader(small_config(num_threads=3), rank=1, size=2, batch=3).fingerprint()
    changes: list[tuple[dict[str, object], str]] = [
        ({"image_size_px": 30}, "image_size_px"),
        ({"augmentation": "random_resized_crop"}, "augmentation"),
        ({"scale_range_px": (40, 68)}, "augmentation"),
        ({"flip_probability": 0.0}, "flip_probability"),
        ({"loader": "torchvision"}, "loader"),
        ({"train_split": "val"}, "content"),
    ]
    for change, key in changes:
        other = build_loader(small_config(**change)).fingerprint()
        assert other[key] != reference[key], key
    assert build_loader(small_config(), seed=1).fingerprint()["seed"] != reference["seed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_resize_px": 31}, "data.val_resize_px: 31 is smaller than the crop data.image_size_px: 32"),
        ({"scale_range_px": (31, 64)}, "data.scale_range_px: 31 is smaller than the crop data.image_size_px: 32"),
        ({"augmentation": "pad_crop_flip"}, "data.augmentation: pad_crop_flip is not for data.dataset: image_folder"),
        ({"dataset": "mnist", "loader": "resident"}, "data.augmentation: scale is not for data.dataset: mnist"),
        ({"dataset": "mnist", "augmentation": "none"}, "data.loader: dali cannot read data.dataset: mnist"),
        (
            {"dataset": "mnist", "loader": "resident", "augmentation": "none", "source": "tfrecord"},
            "data.source: tfrecord is for data.dataset: image_folder, not mnist",
        ),
        ({"randaugment_magnitude": 11}, r"data.randaugment_magnitude: must be in 0\.\.10, got 11"),
        ({"max_image_megapixels": 0}, "data.max_image_megapixels: must be >= 1, got 0"),
        ({"num_threads": 0}, "data.num_threads: must be >= 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    small_config: MakeConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(
    ("source", "missing"), [("manifest", "train.tsv"), ("webdataset", "index.tsv"), ("tfrecord", "index.tsv")]
)
def test_lists_that_are_not_there_are_the_users_error(
    small_config: MakeConfig, build_loader: BuildLoader, source: str, missing: str
) -> None:
    with pytest.raises(ConfigError, match=f"no such file: .*{missing}; make it with python tools/data.py"):
        build_loader(small_config(source=source))

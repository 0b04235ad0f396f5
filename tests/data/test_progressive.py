"""Progressive resizing: the side follows the epoch, the samples and what the windows show do not."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dist.jobs import assert_same_result
from tests.dist.launching import ROOT, train
from unitdist.config import DataConfig
from unitdist.config_file import config_from_dict, config_to_dict, dump_config, load_config
from unitdist.data.batch import Loader
from unitdist.data.progressive import ProgressiveLoader, at_side
from unitdist.errors import ConfigError

STAGES = ((1, 16), (2, 24), (4, 32))
SIDES = [16, 24, 24, 32, 32]


def collected(loader: Loader, epoch: int, start_sample: int = 0) -> tuple[list[int], list[list[int]]]:
    sides, ids = [], []
    for batch in loader.iterate(epoch, start_sample):
        assert batch.images.shape[2] == batch.images.shape[3]
        sides.append(batch.images.shape[3])
        ids.append(batch.sample_ids.tolist())
    return sides, ids


@pytest.mark.parametrize("kind", ["dali", "torchvision", "synthetic"])
def test_side_follows_the_epoch_and_nothing_else_changes(
    small_config: Callable[..., DataConfig], build_loader: Callable[..., Loader], kind: str
) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    changes = {"loader": kind} | (
        {"dataset": "synthetic", "synthetic_samples": 192, "synthetic_classes": 16} if kind == "synthetic" else {}
    )
    plain = build_loader(small_config(**changes), batch=24)
    resizing = build_loader(small_config(progressive_resizing=STAGES, **changes), batch=24)
    assert resizing.batches_per_epoch == plain.batches_per_epoch == 8
    for epoch in (4, 0, 1, 3):  # in any order: a resume begins anywhere
        sides, ids = collected(resizing, epoch)
        assert sides == [SIDES[epoch]] * 8
        assert ids == collected(plain, epoch)[1]
    assert collected(resizing, 1, start_sample=72)[1] == collected(plain, 1, start_sample=72)[1]


def test_last_stage_is_the_plain_loader_to_the_bit(
    small_config: Callable[..., DataConfig], build_loader: Callable[..., Loader]
) -> None:
    plain = build_loader(small_config(loader="torchvision"), batch=64)
    resizing = build_loader(small_config(loader="torchvision", progressive_resizing=STAGES), batch=64)
    for ours, theirs in zip(resizing.iterate(3), plain.iterate(3), strict=True):
        assert torch.equal(ours.images, theirs.images)


def test_validation_stays_at_the_full_side(
    small_config: Callable[..., DataConfig], build_loader: Callable[..., Loader]
) -> None:
    loader = build_loader(small_config(progressive_resizing=STAGES, loader="torchvision"), batch=40, training=False)
    assert set(collected(loader, 0)[0]) == {32}


def test_fingerprint_is_of_all_stages_at_every_epoch(
    small_config: Callable[..., DataConfig], build_loader: Callable[..., Loader]
) -> None:
    config = small_config(progressive_resizing=STAGES, loader="torchvision")
    loader = build_loader(config)
    before = loader.fingerprint()
    next(iter(loader.iterate(0)))
    assert loader.fingerprint() == before
    assert before["progressive_resizing"] == "1: 16, 2: 24, 4: 32" and before["image_size_px"] == 32


def test_windows_of_a_smaller_side_show_the_same_share() -> None:
    config = DataConfig(image_size_px=224, scale_range_px=(256, 480), val_resize_px=256)
    small = at_side(config, 128)
    assert (small.image_size_px, small.scale_range_px, small.val_resize_px) == (128, (146, 274), 146)
    assert at_side(config, 224) == config


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[[2,16]]", r"data\.progressive_resizing: must be pairs whose epochs begin with 1 and increase, got \[\[2, 16\]\]"),
        ("[[1,16],[1,24]]", "epochs begin with 1 and increase"),
        ("[[1,33]]", r"pairs whose sides are in 1\.\.data\.image_size_px \(32\)"),
        ("[[1,16],[3,32]]", r"data\.progressive_resizing: epoch 3 is after the last, train\.epochs: 2"),
        ("[1,16]", r"data\.progressive_resizing\[0\]: expected a list, got 1"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused(stages: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "tests" / "dist" / "small.yaml", [f"data.progressive_resizing={stages}"])


def test_small_sets_have_one_size() -> None:
    with pytest.raises(ConfigError, match="the images of data.dataset: mnist have one size"):
        DataConfig(
            dataset="mnist", loader="resident", augmentation="none", image_size_px=28, progressive_resizing=((1, 14),)
        )


def test_stages_survive_yaml_and_checkpoints(tmp_path: Path) -> None:
    config = load_config(ROOT / "tests" / "dist" / "small.yaml", ["data.progressive_resizing=[[1,16],[2,32]]"])
    assert config.data.progressive_resizing == ((1, 16), (2, 32))
    assert config_from_dict(config_to_dict(config)) == config
    file = tmp_path / "small.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == replace(config, run=replace(config.run, name="small"))


def test_interrupted_run_equals_the_uninterrupted_one(sample_data: Path, tmp_path: Path) -> None:
    """Stopped in the middle of the first epoch of the second stage."""
    shared = [
        "--config", str(ROOT / "tests" / "dist" / "small.yaml"), f"data.path={sample_data}", f"run.folder={tmp_path}",
        "data.progressive_resizing=[[1,16],[2,32]]", "data.loader=torchvision", "train.epochs=2",
    ]  # fmt: skip
    runs = [("whole", []), ("parts", ["train.max_steps=17"]), ("parts", ["--resume", "auto"])]
    for name, changes in runs:
        done = train([sys.executable], *shared, f"run.name={name}", *changes)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_result(tmp_path / "parts", tmp_path / "whole")


def test_broken_images_of_earlier_sides_still_count(small_config: Callable[..., DataConfig]) -> None:
    class Stage:
        max_broken, ignored = 3, 1

        def __init__(self, config: DataConfig) -> None:
            self.side, self.broken = config.image_size_px, {f"{config.image_size_px} px": "empty file", "both": "gone"}

        def fingerprint(self) -> dict[str, str]:
            return {}

        def iterate(self, epoch: int, start_sample: int = 0) -> list[int]:
            return [self.side]

        def close(self) -> None: ...

    loader = ProgressiveLoader(small_config(progressive_resizing=STAGES), Stage)  # type: ignore[arg-type]
    assert [*loader.iterate(0), *loader.iterate(1), *loader.iterate(2)] == [16, 24, 24]
    assert set(loader.broken) == {"32 px", "16 px", "24 px", "both"}
    assert (loader.max_broken, loader.ignored) == (3, 1)

"""tools/data.py audit, stats and bench."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RunData = Callable[..., tuple[int, str, str]]


def test_audit_proves_exactly_once_for_each_source(packed: Path, sample_data: Path, run_data: RunData) -> None:
    for folder, source in ((sample_data, "folder"), (packed / "tars", "webdataset")):
        for world, batch in ((1, 32), (5, 7), (8, 3)):
            code, output, _ = run_data("audit", folder, "--source", source, "--world", world, "--batch", batch)
            steps, left_out = divmod(192, world * batch)
            assert code == 0
            ranks = f"{world} rank{'s' if world > 1 else ''}"
            expected = f"epoch 2: {steps} steps x {ranks} x {batch} images, none twice, {left_out} left out"
            assert expected in output
            assert f"each of 192 images exactly once on {ranks}" in output


def test_audit_finds_a_repeated_sample(sample_data: Path, run_data: RunData, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = importlib.import_module("data_verbs.audit")
    plan = audit.training_plan

    def repeating(*arguments: object):
        result = plan(*arguments)
        result.sample_ids[-1] = result.sample_ids[0]
        return result

    monkeypatch.setattr(audit, "training_plan", repeating)
    code, _, error = run_data("audit", sample_data, "--world", 2, "--batch", 8)
    assert code == 1 and "images twice" in error


def test_audit_of_no_step_is_an_error(sample_data: Path, run_data: RunData) -> None:
    code, output, error = run_data("audit", sample_data, "--world", 64, "--batch", 4)
    assert (code, output) == (2, "") and "has 192 images, a step of 64 ranks x 4 takes 256" in error


def test_stats_are_those_of_the_pixels_and_a_picture_is_drawn(
    sample_data: Path, tmp_path: Path, run_data: RunData
) -> None:
    code, output, _ = run_data("stats", sample_data, "--split", "val", "--picture", tmp_path / "sizes.png")
    pixels = []
    for path in sorted((sample_data / "val").glob("*/*")):
        with Image.open(path) as image:
            pixels.append(np.asarray(image.convert("RGB")).reshape(-1, 3))
    mean, std = (getattr(np.concatenate(pixels) / 255, name)(axis=0).round(4).tolist() for name in ("mean", "std"))
    assert code == 0
    assert f"looked at 80: mean {mean}, std {std}" in output
    assert "80 images in 16 classes, 5 to 5 per class" in output
    with Image.open(tmp_path / "sizes.png") as picture:
        assert picture.width > 500


def test_bench_prints_a_line_per_source_and_number_of_threads(
    sample_data: Path, tmp_path: Path, run_data: RunData
) -> None:
    for images, number in ((2048, 192), (100, 100)):
        code, output, error = run_data("bench", sample_data, "--images", images, "--threads", 1, 2)
        assert (code, output) == (2, "")
        assert error.endswith(f"and --images {images}: {number} images to read; at least 256 are needed\n")
    for number in range(2):
        shutil.copytree(sample_data / "train", tmp_path / "train" if number == 0 else tmp_path / "more")
    for path in list((tmp_path / "more").glob("*/*")):
        path.rename(tmp_path / "train" / path.parent.name / f"more_{path.name}")
    code, output, _ = run_data("bench", tmp_path, "--images", 320, "--threads", 1, 2)
    assert code == 0
    assert output.count("| folder | ") == 2 and "fastest here: data.source=folder data.num_threads=" in output

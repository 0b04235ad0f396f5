"""The doctor's look at the run folder and at the data."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.doctor.checking import check
from unitdist.doctor import machine, probes
from unitdist.doctor.data_folder import check_data


def test_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert probes.write_error(tmp_path / "not" / "yet" / "there") == ""
    check(
        machine.check_run_folder(Path("/proc/nowhere"), probes.write_error(Path("/proc/nowhere"))),
        "fault",
        "run.folder=DIR",
    )


def test_data_folder(sample_data: Path, tmp_path: Path) -> None:
    check(check_data(sample_data), "ok", "16 classes in train and val")
    check(check_data(None), "note", "--data DIR")
    check(check_data(tmp_path / "none"), "fault", "no such folder")
    check(check_data(sample_data, val_split="validation"), "fault", "no such folder")
    check(check_data(tmp_path, image_folder=False), "note")


@pytest.mark.parametrize("package", ["numpy", "PIL"])
def test_data_folder_without_what_reads_it(package: str, sample_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("unitdist.data")]:
        monkeypatch.delitem(sys.modules, name)
    check(check_data(sample_data), "fault", f"import of {package} halted", "pip install")


def test_data_folder_with_faults(sample_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(sample_data, copy)
    (copy / "val" / "extra").mkdir()
    check(check_data(copy), "fault", "extra")
    (copy / "train" / "extra").mkdir()
    check(check_data(copy), "fault", "1 of 17 classes hold no image, extra for one")
    for split in ("train", "val"):
        shutil.rmtree(copy / split / "extra")
    first = sorted((copy / "train").iterdir())[0]
    for image in first.iterdir():
        image.write_bytes(image.read_bytes()[:300])
    check(check_data(copy), "fault", "does not decode", str(first))


def test_folders_behind_one_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a user without the right to search the parent; root may enter everything, so `stat` says it for them."""
    stat, locked = os.stat, tmp_path / "locked"
    locked.mkdir()

    def refuse(path, *arguments, **options):
        if locked in Path(os.fsdecode(path)).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refuse)
        finding = check_data(locked / "imagenet")
        place = probes.nearest_existing(locked / "runs" / "one")
    check(finding, "fault", f"cannot read {locked / 'imagenet'}: Permission denied")
    assert place == locked

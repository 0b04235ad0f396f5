"""tools/data.py prepare-train and prepare-val: from the downloads to a first epoch."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.tools.downloads import imagenet_downloads
from tests.tools.loading import loader_of, small
from unitdist.data.build import build_val_loader
from unitdist.world import World

RunData = Callable[..., tuple[int, str, str]]


def test_imagenet_downloads_become_a_first_epoch_step_by_step(
    sample_data: Path, tmp_path: Path, run_data: RunData
) -> None:
    names = imagenet_downloads(tmp_path, sample_data)
    root = tmp_path / "imagenet"
    code, output, _ = run_data("prepare-train", tmp_path / "ILSVRC2012_img_train.tar", "--output", root / "train")
    assert (code, output) == (0, f"36 images in 3 class folders under {root / 'train'}\n")
    shutil.rmtree(root / "train" / "n01443537")
    assert run_data("prepare-train", tmp_path / "ILSVRC2012_img_train.tar", "--output", root / "train")[1] == output
    val = ("prepare-val", tmp_path / "ILSVRC2012_img_val.tar", "--labels")
    assert run_data(*val, tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "--output", root / "val")[0] == 0
    assert run_data(*val, tmp_path / "LOC_val_solution.csv", "--output", tmp_path / "by_csv")[0] == 0
    flat = tmp_path / "flat"
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar") as archive:
        flat.mkdir()
        for member in archive:  # extractall's `filter` came with Python 3.11.4, and without it newer ones warn
            image = archive.extractfile(member)
            assert image is not None
            (flat / member.name).write_bytes(image.read())
    folder_val = (
        "prepare-val",
        flat,
        "--labels",
        tmp_path / "LOC_val_solution.csv",
        "--output",
        tmp_path / "by_folder",
    )
    assert run_data(*folder_val)[0] == 0
    for made in (root / "val", tmp_path / "by_csv", tmp_path / "by_folder"):
        assert {d.name: sorted(f.name for f in d.iterdir()) for d in made.iterdir()} == names
    assert run_data("scan", root / "train")[0] == run_data("scan", root / "val")[0] == 0
    config = small(root, "manifest")
    assert len(list(loader_of(config, batch=6).iterate(0))) == 6
    val_loader = build_val_loader(config, World.single(), per_rank_batch_size=4, device=torch.device("cpu"))
    assert sum(int(batch.valid.sum()) for batch in val_loader.iterate(0)) == 15
    assert val_loader.class_to_idx == {"n01440764": 0, "n01443537": 1, "n04579145": 2}


def test_wrong_labels_and_hostile_archives_are_refused(sample_data: Path, tmp_path: Path, run_data: RunData) -> None:
    imagenet_downloads(tmp_path, sample_data)
    images, output = tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "val"
    lines = (tmp_path / "LOC_val_solution.csv").read_text().split("\n")
    (tmp_path / "short.csv").write_text("\n".join(lines[:5]))
    code, _, error = run_data("prepare-val", images, "--labels", tmp_path / "short.csv", "--output", output)
    assert code == 1 and "says nothing about 11 images, first ILSVRC2012_val_" in error
    code, _, error = run_data("prepare-val", images, "--labels", tmp_path / "none.csv", "--output", output)
    assert code == 2 and "no such file or folder" in error
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        info = tarfile.TarInfo("../../evil.JPEG")
        archive.addfile(info, io.BytesIO())
    code, _, error = run_data(
        "prepare-val", tmp_path / "evil.tar", "--labels", tmp_path / "LOC_val_solution.csv", "--output", output
    )
    assert code == 1 and "'../../evil.JPEG', expected plain file names: refused" in error
    (tmp_path / "evil.csv").write_text("ILSVRC2012_val_00000001,../evil\n")
    code, _, error = run_data("prepare-val", images, "--labels", tmp_path / "evil.csv", "--output", output)
    assert code == 1 and "'../evil', expected plain file names: refused" in error
    (tmp_path / "cut.tar").write_bytes((tmp_path / "ILSVRC2012_img_train.tar").read_bytes()[:300_000])
    code, _, error = run_data("prepare-train", tmp_path / "cut.tar", "--output", tmp_path / "t")
    assert code == 1 and "cut.tar is damaged or cut off" in error


def test_labels_that_are_no_devkit_and_no_csv_are_one_line(
    sample_data: Path, tmp_path: Path, run_data: RunData
) -> None:
    (tmp_path / "labels.txt").write_text("hello\n")
    options = ("--labels", tmp_path / "labels.txt", "--output", tmp_path / "val")
    code, _, error = run_data("prepare-val", sample_data / "val" / "cat", *options)
    assert code == 1 and error.count("\n") == 1
    assert "labels.txt is neither a CSV file like Kaggle's LOC_val_solution.csv nor a readable tar file" in error

"""tools/data.py scan: a verdict for every odd file, resumable, and training agrees."""

import importlib
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unitdist.config import DataConfig
from unitdist.data.build import build_train_loader
from unitdist.world import World

RunData = Callable[..., tuple[int, str, str]]


def test_scan_gives_each_of_32_odd_files_its_verdict_and_training_agrees(odd_folder, run_data: RunData) -> None:
    root, files = odd_folder
    code, output, _ = run_data("scan", root / "train", "--threads", 2)
    assert code == 0
    rows = [line.split("\t") for line in (root / "train.tsv").read_text().split("\n")[1:-1]]
    verdicts = {Path(row[0]).name: row[6] for row in rows if Path(row[0]).name in files}
    assert verdicts == {name: verdict for name, (_, verdict) in files.items()}
    bad = {name for name, (_, verdict) in files.items() if verdict != "ok"}
    for name in bad:
        assert f"bad: {root / 'train' / 'odd' / name} ({verdicts[name]})" in output
    assert f"{24 + len(files) - len(bad)} good and {len(bad)} bad images in 2 classes" in output
    assert "odd, but fine: 1 cmyk (cmyk)" in output and "odd, but fine: 1 png named .jpg (png)" in output
    crc_of = {Path(row[0]).name: row[5] for row in rows}
    assert crc_of["cmyk.jpg"] == f"{zlib.crc32((root / 'train' / 'odd' / 'cmyk.jpg').read_bytes()):08x}"

    def config(**changes: object) -> DataConfig:
        sizes = {"image_size_px": 32, "scale_range_px": (40, 64), "val_resize_px": 40, "num_threads": 1}
        return DataConfig(path=str(root), **(sizes | changes))  # type: ignore[arg-type]

    arguments = {"per_rank_batch_size": 6, "seed": 0, "device": torch.device("cpu")}
    from_manifest = build_train_loader(config(source="manifest"), World.single(), **arguments)
    assert len(list(from_manifest.iterate(0))) == (24 + len(files) - len(bad)) // 6
    assert from_manifest.broken == {}
    for loader_name in ("dali", "torchvision"):
        settings = config(loader=loader_name, on_broken="replace", max_broken_share=0.5)
        loader = build_train_loader(settings, World.single(), **(arguments | {"per_rank_batch_size": 8}))
        for epoch in range(2):
            assert len(list(loader.iterate(epoch))) == 7
        assert {Path(name).name for name in loader.broken} == bad
        loader.close()
    from_manifest.close()


def test_scan_without_dali_says_what_to_install_and_other_verbs_work(
    sample_data: Path, run_data: RunData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "unitdist.data.dali_check", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    code, _, error = run_data("scan", sample_data / "val")
    assert code == 2
    assert error.startswith("error: scan needs NVIDIA DALI: pip install -c constraints.txt -e '.[dali-cuda13]'")
    assert run_data("audit", sample_data, "--world", 2, "--batch", 8)[0] == 0


def test_interrupted_scan_continues_and_gives_the_same_manifest(
    odd_folder, run_data: RunData, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = odd_folder
    scan = importlib.import_module("data_verbs.scan")
    monkeypatch.setattr(scan, "BATCH", 10)
    run_data("scan", root / "train", "--output", root / "whole.tsv")
    check_batch, calls = scan.check_batch, []

    def interrupted(*arguments: object) -> list[str]:
        calls.append(arguments[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return check_batch(*arguments)

    monkeypatch.setattr(scan, "check_batch", interrupted)
    code, _, error = run_data("scan", root / "train")
    assert code == 130 and "continue where they were" in error
    with open(root / "train.tsv.part", "a") as part:
        part.write("half a li")
    code, _, _ = run_data("scan", root / "train")
    assert code == 0 and calls[3] == range(20, 30)
    assert (root / "train.tsv").read_text() == (root / "whole.tsv").read_text()
    assert not (root / "train.tsv.part").exists()

"""Fixtures of the tests of tools/data.py."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.data.test_shards import example, tfrecord
from tests.tools.odd_files import odd_files
from unitdist.config import DataConfig
from unitdist.data.build import open_source

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RunData = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunData:
    """run_data("scan", folder, ...) -> (exit code, stdout, stderr), in this process."""
    monkeypatch.syspath_prepend(str(TOOLS))
    data = importlib.import_module("data")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["data.py", *map(str, arguments)])
        code = data.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def odd_folder(sample_data: Path, tmp_path: Path) -> tuple[Path, dict[str, tuple[bytes | None, str]]]:
    """root/train with the 32 odd files in class odd beside class cat; root/val likewise, all good."""
    for split in ("train", "val"):
        for class_name, source in (("cat", "cat"), ("odd", "moon")):
            shutil.copytree(sample_data / split / source, tmp_path / split / class_name)
    with Image.open(sample_data / "train" / "coffee" / "coffee_0000.jpg") as opened:
        files = odd_files(opened.convert("RGB").resize((160, 120)))
    for name, (content, _) in files.items():
        path = tmp_path / "train" / "odd" / name
        if content is None:
            path.symlink_to("nowhere.jpg")
        else:
            path.write_bytes(content)
    return tmp_path, files


def write_tfrecords(root: Path, split: str, index) -> None:
    names = list(index.class_to_idx)
    (root / split).mkdir(parents=True)
    for start in range(0, len(index), 25):
        records = [
            example({"image/encoded": index.read(i), "image/class/synset": names[index.labels[i]].encode()})
            for i in range(start, min(start + 25, len(index)))
        ]
        (root / split / f"{split}-{start // 25:05d}-of-00008").write_bytes(tfrecord(records))


@pytest.fixture
def packed(sample_data: Path, tmp_path: Path, run_data: RunData) -> Path:
    """The sample data as tars/{train,val} (pack) and records/{train,val} (index)."""
    for split in ("train", "val"):
        target = tmp_path / "tars" / split
        code, output, _ = run_data(
            "pack", sample_data / split, "--output", target, "--images-per-shard", 20, "--workers", 1
        )
        assert code == 0 and "verified" in output
        write_tfrecords(tmp_path / "records", split, open_source(DataConfig(), sample_data / split))
        code, output, _ = run_data("index", tmp_path / "records" / split, "--kind", "tfrecord")
        assert code == 0 and "images of 16 classes" in output
    return tmp_path

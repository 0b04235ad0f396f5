"""tools/make_sample_data.py: real photographs, the same bytes for the same seed, train and val disjoint."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / "make_sample_data.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.jpg"))
    }


@pytest.fixture
def sample_data_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import sample_data

    return sample_data


def test_manifest_lists_every_file_with_its_sha256(sample_data: Path) -> None:
    manifest = json.loads((sample_data / "manifest.json").read_text())
    assert manifest["files"] == file_hashes(sample_data)
    assert len(manifest["files"]) == 16 * (12 + 5)
    assert manifest["classes"] == sorted(path.name for path in (sample_data / "val").iterdir())


def test_same_seed_gives_same_bytes_and_another_seed_gives_others(sample_data: Path, tmp_path: Path) -> None:
    counts = ("--train-per-class", 2, "--val-per-class", 1, "--quiet")
    assert run_script("--output", tmp_path / "same", "--seed", 0, *counts).returncode == 0
    assert run_script("--output", tmp_path / "other", "--seed", 1, *counts).returncode == 0
    same, other, session = (file_hashes(folder) for folder in (tmp_path / "same", tmp_path / "other", sample_data))
    assert same.items() <= session.items()  # a smaller set is part of the larger one
    assert not set(same.values()) & set(other.values())


def test_images_are_jpegs_of_varied_sizes_in_colour_and_grayscale(sample_data: Path) -> None:
    sizes, modes = [], set()
    for path in sorted((sample_data / "train").rglob("*.jpg")):
        with Image.open(path) as image:
            assert image.format == "JPEG"
            sizes.append(image.size)
            modes.add(image.mode)
    assert modes == {"RGB", "L"}
    assert 0.45 < sizes.count((500, 375)) / len(sizes) < 0.75
    assert len(set(sizes)) > 20
    assert min(min(size) for size in sizes) >= 340 and max(max(size) for size in sizes) <= 640


@pytest.mark.parametrize("size", [(512, 512), (451, 300), (448, 172), (1000, 872)])
def test_cells_tile_the_photograph_and_no_two_val_cells_touch_by_an_edge(sample_data_module, size) -> None:
    cells = sample_data_module.grid_cells(*size)
    boxes = cells["train"] + cells["val"]
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in boxes) == size[0] * size[1]
    covered = set()
    for left, top, right, bottom in boxes:
        pixels = {(x, y) for x in range(left, right, 7) for y in range(top, bottom, 7)}
        assert not covered & pixels
        covered |= pixels
    assert 0.15 < len(cells["val"]) / len(boxes) < 0.35
    for a in cells["val"]:
        for b in cells["val"]:
            shares_vertical_edge = a[2] == b[0] and min(a[3], b[3]) > max(a[1], b[1])
            shares_horizontal_edge = a[3] == b[1] and min(a[2], b[2]) > max(a[0], b[0])
            assert not shares_vertical_edge and not shares_horizontal_edge


def test_existing_output_is_refused(sample_data: Path) -> None:
    result = run_script("--output", sample_data)
    assert result.returncode == 2
    assert result.stderr == f"error: {sample_data / 'train'} is there already: give another --output or remove it\n"


def test_zero_images_per_class_is_refused(tmp_path: Path) -> None:
    result = run_script("--output", tmp_path, "--val-per-class", 0)
    assert result.returncode == 2
    assert "--train-per-class and --val-per-class must be >= 1" in result.stderr

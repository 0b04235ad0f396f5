"""The script, from the repository's root and under torchrun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.arguments import options_from_arguments, parser
from evaluation.options import EvaluationOptions

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["--crop-px", "32", "--scales-px", "32,40", "--single-scale-px", "40", "--device", "cpu"]


def script(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "evaluation/multi_scale.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=250)


def test_the_script_prints_both_protocols_and_leaves_the_report(checkpoint: Path, small_val: Path, tmp_path: Path) -> None:
    done = script("--checkpoint", checkpoint, "--data", small_val, "--output", tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "crops: cifar_resnet20, unitization; 34 images, 12 views each (with mirrors), softmax averaged" in done.stdout
    assert "fully_convolutional: cifar_resnet20, unitization; 34 images, 4 views each (with mirrors)" in done.stdout
    assert f"report: {tmp_path / 'report.json'}" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["schema"] == "unitdist-evaluation-1"
    assert report["count"] == 34
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json", "timing.json", "partial",
        *(f"{name}_{kind}" for name in ("crops", "fully_convolutional")
          for kind in ("per_class.png", "confusion.png", "calibration.png", "errors.html")),
    }  # fmt: skip


def test_errors_are_one_line_without_traceback() -> None:
    done = script("--checkpoint", "nowhere.pt", "--data", ".")
    assert (done.returncode, done.stderr) == (2, "unitdist: error: checkpoint not found: nowhere.pt\n")


def test_a_broken_image_of_one_rank_ends_all_with_its_name_and_no_traceback_of_ours(
    checkpoint: Path, small_val: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_val, tmp_path / "data")
    broken = sorted((tmp_path / "data").rglob("*_00*.jpg"))[20]
    broken.write_bytes(broken.read_bytes()[:3000])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = script("--checkpoint", checkpoint, "--data", tmp_path / "data", *SMALL, "--images-per-chunk", 4, launcher=launcher)
    assert done.returncode == 1
    assert done.stderr.count(f"error: 1 image cannot be decoded; first: {broken}: ") == 1
    assert "multi_scale.py\", line" not in done.stderr


def test_every_option_is_a_flag_with_help() -> None:
    text = parser().format_help()
    flags = {name: "--" + name.replace("_", "-") for name in EvaluationOptions.__dataclass_fields__}
    flags["views_per_scale"] = "--crops-per-scale"
    for flag in flags.values():
        assert flag in text


def test_flags_reach_the_options() -> None:
    line = "--checkpoint c --data d --scales-px 224,300 --crops-per-scale 1,5 --no-mirror --mean 0.5,0.5,0.5 --std 1,1,1 --labels f"
    options = options_from_arguments(parser().parse_args(line.split()))
    assert (options.scales_px, options.views_per_scale, options.mirror) == ((224, 300), (1, 5), False)
    assert (options.mean, options.std, options.labels) == ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0), Path("f"))
    assert options_from_arguments(parser().parse_args(["--checkpoint", "c", "--data", "d"])) == EvaluationOptions()


def test_a_list_that_is_no_list_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parser().parse_args(["--checkpoint", "c", "--data", "d", "--scales-px", "224;256"])
    assert left.value.code == 2
    assert "expected ints with commas between them, got '224;256'" in capsys.readouterr().err

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.after_training import evaluate_run
from evaluation.image_list import list_images
from unitdist.config import Config, DataConfig, EvaluationConfig
from unitdist.config_file import config_from_dict, config_to_dict
from unitdist.errors import ConfigError
from unitdist.train.checkpoint import read_checkpoint, save_checkpoint
from unitdist.world import World

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def finished_run(checkpoint: Path, small_val: Path, tmp_path: Path) -> tuple[Config, Path]:
    """Config and folder of a training that has ended; its data folder holds `holdout` as validation split."""
    content = read_checkpoint(checkpoint)
    trained = config_from_dict(content["config"])
    data = dataclasses.replace(trained.data, path=str(tmp_path / "data"), val_split="holdout", loader="torchvision", num_threads=1)
    section = EvaluationConfig(protocols=("single", "crops"), scales_px=(32, 40), crop_px=32, average="logits")
    config = dataclasses.replace(trained, data=data, evaluation=section)
    shutil.copytree(small_val, tmp_path / "data" / "holdout")
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "best.pt", {**content, "config": config_to_dict(config)})
    return config, tmp_path / "run"


def test_the_protocols_of_the_config_are_run_on_the_best_checkpoint(
    finished_run: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = finished_run
    evaluate_run(config, folder, World.single())
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    assert list(report["protocols"]) == ["single", "crops"]
    assert report["count"] == 34
    assert report["protocols"]["crops"]["views"] == 12
    assert report["protocols"]["crops"]["average"] == "logits"
    assert report["protocols"]["single"]["scales"][0]["scale_px"] == 37  # data.val_resize_px
    assert "single: cifar_resnet20, unitization; 34 images" in capsys.readouterr().out


def test_without_a_best_checkpoint_the_last_one_is_evaluated(finished_run: tuple[Config, Path]) -> None:
    config, folder = finished_run
    (folder / "best.pt").rename(folder / "last.pt")
    section = dataclasses.replace(config.evaluation, protocols=("single",))
    evaluate_run(dataclasses.replace(config, evaluation=section), folder, World.single())
    assert json.loads((folder / "evaluation" / "report.json").read_text())["network"]["source"] == "last.pt"


def test_a_split_of_tars_is_evaluated_like_its_folder(finished_run: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = finished_run
    evaluate_run(config, folder, World.single())
    of_files = json.loads((folder / "evaluation" / "report.json").read_text())
    command = [sys.executable, "tools/data.py", "pack", tmp_path / "data" / "holdout", "--output", tmp_path / "tars" / "holdout"]
    subprocess.run([*command, "--images-per-shard", "20", "--workers", "1"], cwd=REPOSITORY, check=True, timeout=200)
    data = dataclasses.replace(config.data, path=str(tmp_path / "tars"), source="webdataset")
    evaluate_run(dataclasses.replace(config, data=data), folder, World.single())
    of_tars = json.loads((folder / "evaluation" / "report.json").read_text())
    for name, summary in of_files["protocols"].items():
        assert of_tars["protocols"][name]["top5_correct"] == summary["top5_correct"]
        assert of_tars["protocols"][name]["per_class"] == summary["per_class"]
    assert len(list_images(tmp_path / "tars", val_split="holdout")) == 34


def test_protocols_need_a_data_set_of_image_files() -> None:
    data = DataConfig(
        path="data", dataset="cifar10", loader="resident", image_size_px=32, val_resize_px=32, augmentation="pad_crop_flip"
    )
    with pytest.raises(ConfigError, match="evaluation.protocols: single need data.dataset: image_folder, not cifar10"):
        Config(data=data, evaluation=EvaluationConfig(protocols=("single",)))

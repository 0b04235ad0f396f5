"""Folders for hubs: what tools/export.py writes is what load_pretrained, timm and torch.hub read."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import unitdist
import unitdist.timm
from evaluation.scores import accuracy_summary
from unitdist import hub
from unitdist.config import Config, DataConfig, ModelConfig
from unitdist.config_file import config_to_dict
from unitdist.errors import CheckpointError, ConfigError
from unitdist.models.build import build_model
from unitdist.train.checkpoint import FORMAT

sys.path.insert(0, str(Path(__file__).parent))
from trained import disturb_norms  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = Config(
    model=ModelConfig(name="preact_resnet18", num_classes=3),
    data=DataConfig(image_size_px=64, val_resize_px=73, scale_range_px=(73, 128)),
)
CLASSES = {"cat": 1, "bird": 0, "dog": 2}
METRICS = {"last": {"epoch": 7, "loss": 0.5, "top1": 81.25, "top5": 100.0, "count": 80}}
LABELS = np.zeros(80, dtype=np.int64)
SCORES = np.eye(8)[np.repeat([0, 1], (70, 10))]
"""70 of 80 right: what the evaluation module itself counts goes into the report, in percent."""
REPORT = {
    "schema": "unitdist-evaluation-1",
    "protocols": {
        "crops": {
            **accuracy_summary(SCORES, LABELS),
            "views": 42,
            "average": "softmax",
            "mirrored": True,
            "scales": [],
        }
    },
}


def make_checkpoint(config: Config = CONFIG, *, with_ema: bool = False) -> tuple[dict[str, Any], nn.Module]:
    """A checkpoint with the keys that the trainer writes, and the network behind it."""
    torch.manual_seed(0)
    model = disturb_norms(build_model(config.model, image_size_px=config.data.image_size_px))
    average = {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    checkpoint = {
        "format": FORMAT,
        "config": config_to_dict(config),
        "model": dict(model.state_dict()),
        "model_ema": average if with_ema else None,
        "epoch": 7,
        "step": 420,
        "class_to_idx": CLASSES,
        "metrics": METRICS,
        "versions": {"unitdist": "0.1.0", "torch": "2.15.0", "python": "3.11.2", "world_size": 2},
    }
    return checkpoint, model


def images(side_px: int = 64) -> Tensor:
    return torch.randn(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """The folder that the script wrote, with ONNX, and the network."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint, model = make_checkpoint()
    torch.save(checkpoint, folder / "best.pt")
    (folder / "report.json").write_text(json.dumps(REPORT))
    arguments = ["--checkpoint", folder / "best.pt", "--output", folder / "out", "--evaluation", folder / "report.json"]
    result = run_script(*arguments, "--onnx")
    assert result.returncode == 0, result.stderr
    assert f"wrote README.md, config.json, model.onnx, model.safetensors to {folder / 'out'}" in result.stdout
    return folder / "out", model


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "export.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)


@pytest.fixture
def copy_of_exported(exported: tuple[Path, nn.Module], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[0], tmp_path / "copy"))


def test_loaded_network_computes_the_same_logits(exported: tuple[Path, nn.Module]) -> None:
    folder, model = exported
    state = torch.get_rng_state()
    loaded = unitdist.load_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    for side_px in (64, 96):
        assert torch.equal(loaded(images(side_px)), model(images(side_px)))


def test_timm_loads_the_same_folder(exported: tuple[Path, nn.Module]) -> None:
    folder, model = exported
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.pretrained_cfg["input_size"] == [3, 64, 64] and loaded.num_classes == 3


def test_torch_hub_finds_the_entry_points(exported: tuple[Path, nn.Module]) -> None:
    folder, model = exported
    repository = str(REPOSITORY)
    loaded = torch.hub.load(repository, "pretrained", str(folder), source="local")
    assert torch.equal(loaded(images()), model(images()))
    fresh = torch.hub.load(repository, "net", "cifar_resnet20", num_classes=7, image_size_px=32, source="local")
    assert fresh(torch.randn(2, 3, 32, 32)).shape == (2, 7) and int(fresh.final_norm.norm_divisor) == 64


def test_onnx_file_gives_the_same_logits(exported: tuple[Path, nn.Module]) -> None:
    import onnxruntime

    folder, model = exported
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images(80).numpy()})[0])
    torch.testing.assert_close(found, model(images(80)).detach(), rtol=1e-4, atol=1e-4)


def test_whoever_may_read_the_folder_may_read_every_file(exported: tuple[Path, nn.Module]) -> None:
    assert len({file.stat().st_mode for file in exported[0].iterdir()}) == 1


def test_config_json_says_what_a_user_needs(exported: tuple[Path, nn.Module]) -> None:
    description = hub.read_description(exported[0])
    assert description["classes"] == ["bird", "cat", "dog"]
    assert description["norm_divisors"]["stages.0.0.norm1"] == 16**2 and len(description["norm_divisors"]) == 16
    assert description["preprocessing"] == {
        "channels": 3,
        "image_size_px": 64,
        "resize_px": 73,
        "crop": "center",
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert description["model"]["name"] == "preact_resnet18" and description["recipe"] == config_to_dict(CONFIG)
    assert description["results"]["validation_percent"]["top1"] == 81.25
    assert description["results"]["protocols"]["crops"]["views"] == 42
    assert description["weights"]["num_parameters"] == sum(parameter.numel() for parameter in exported[1].parameters())


def test_model_card_holds_results_recipe_and_divisors(exported: tuple[Path, nn.Module]) -> None:
    card = (exported[0] / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: unitdist\n")
    assert "# preact_resnet18, unitization, 3 classes" in card
    assert "| single crop, validation in the loop, epoch 7 | 81.25 | 100.00 | 80 |" in card
    assert "| crops, 42 views, softmax averaged | 87.50 | 100.00 | 80 |" in card
    assert "| optim.lr | `" in card and "| schedule.milestones_epochs | `[31, 61, 91]` |" in card
    assert "256 (4 layers)" not in card and "256 (5 layers)" in card
    assert "data.path" not in card and "run.folder" not in card


def test_averaged_weights_are_taken_where_there_are_such(tmp_path: Path) -> None:
    checkpoint, model = make_checkpoint(with_ema=True)
    hub.export_checkpoint(checkpoint, tmp_path / "auto")
    hub.export_checkpoint(checkpoint, tmp_path / "model", weights="model")
    averaged, trained = unitdist.load_pretrained(tmp_path / "auto"), unitdist.load_pretrained(tmp_path / "model")
    assert torch.equal(averaged.classifier.weight, model.classifier.weight + 1)
    assert torch.equal(trained.classifier.weight, model.classifier.weight)
    assert "the averaged weights (EMA) after epoch 7 (step 420)" in (tmp_path / "auto" / "README.md").read_text()
    without, _ = make_checkpoint()
    with pytest.raises(ConfigError, match="--weights model_ema: this run kept no averaged weights"):
        hub.export_checkpoint(without, tmp_path / "none", weights="model_ema")


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    checkpoint, _ = make_checkpoint()
    with pytest.raises(ConfigError, match=f"--output: cannot make the folder {tmp_path / 'taken'}: File exists"):
        hub.export_checkpoint(checkpoint, tmp_path / "taken")


@pytest.mark.parametrize("arm", ["batchnorm", "groupnorm"])
def test_other_arms_and_switches_go_round(arm: str, tmp_path: Path) -> None:
    groups = 4 if arm == "groupnorm" else None
    model = replace(CONFIG.model, norm=arm, group_norm_groups=groups, final_norm=True, raw_projection=False)
    checkpoint, net = make_checkpoint(replace(CONFIG, model=model))
    description = hub.export_checkpoint(checkpoint, tmp_path)
    assert torch.equal(unitdist.load_pretrained(tmp_path)(images()), net(images()))
    assert ("architecture" in description) == (arm == "batchnorm")
    assert "this network has no Unitization layer" in (tmp_path / "README.md").read_text()
    if arm == "batchnorm":
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(images()), net(images()))


def test_converted_timm_model_goes_round(tmp_path: Path) -> None:
    checkpoint, net = make_checkpoint(replace(CONFIG, model=ModelConfig(name="timm:resnet10t", num_classes=3)))
    description = hub.export_checkpoint(checkpoint, tmp_path)
    assert torch.equal(unitdist.load_pretrained(tmp_path)(images()), net(images()))
    assert "architecture" not in description


def test_grayscale_net_goes_round(tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(name="mnist_resnet8", num_classes=3),
        data=DataConfig(dataset="mnist", loader="resident", augmentation="none", image_size_px=28),
    )
    checkpoint, net = make_checkpoint(config)
    description = hub.export_checkpoint(checkpoint, tmp_path)
    x_nchw = torch.randn(2, description["preprocessing"]["channels"], 28, 28)
    assert x_nchw.shape[1] == 1
    assert torch.equal(unitdist.load_pretrained(tmp_path)(x_nchw), net(x_nchw))
    assert "28 x 28 px; values in" in (tmp_path / "README.md").read_text()


def test_repository_is_downloaded_only_where_the_source_says_so(
    exported: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(exported[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ConfigError, match="no such folder: owner/name; a repository on the Hugging Face hub is written hf:"
    ):
        unitdist.load_pretrained("owner/name")
    assert asked == []
    unitdist.load_pretrained("hf:owner/name")
    unitdist.load_pretrained("hf:owner/name@v2")
    files = ["model.safetensors", "config.json", "README.md"]
    assert asked == [("owner/name", None, files), ("owner/name", "v2", files)]


def test_flipped_bit_is_seen(copy_of_exported: Path) -> None:
    file = copy_of_exported / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match="model.safetensors is damaged: its checksum is not the one in config.json"
    ):
        unitdist.load_pretrained(copy_of_exported)


def test_missing_and_foreign_files_are_named(copy_of_exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.json; tools/export.py makes such folders"):
        unitdist.load_pretrained(tmp_path)
    (copy_of_exported / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        unitdist.load_pretrained(copy_of_exported)
    (copy_of_exported / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(CheckpointError, match=r"is not one of unitdist's \(no format: unitdist-hub-1\)"):
        unitdist.load_pretrained(copy_of_exported)
    (copy_of_exported / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        unitdist.load_pretrained(copy_of_exported)


def test_changed_norm_divisor_is_seen(copy_of_exported: Path) -> None:
    file = copy_of_exported / "config.json"
    description = json.loads(file.read_text())
    description["norm_divisors"]["stages.0.0.norm1"] = 1
    file.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="the norm divisors in config.json and in model.safetensors differ"):
        unitdist.load_pretrained(copy_of_exported)


def test_script_reports_errors_in_one_line(tmp_path: Path) -> None:
    checkpoint, _ = make_checkpoint()
    torch.save({**checkpoint, "model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    (tmp_path / "report.json").write_text("[]")
    output = ["--output", tmp_path / "out", "--checkpoint"]
    with ThreadPoolExecutor() as pool:
        missing, other, report = pool.map(
            lambda arguments: run_script(*arguments),
            [
                [*output, tmp_path / "none.pt"],
                [*output, tmp_path / "other.pt"],
                [*output, tmp_path / "other.pt", "--evaluation", tmp_path / "report.json"],
            ],
        )
    assert missing.returncode == 2 and "checkpoint not found" in missing.stderr and "Traceback" not in missing.stderr
    assert other.returncode == 1 and "the checkpoint belongs to another model" in other.stderr
    assert report.returncode == 2 and "is no report.json of evaluation/multi_scale.py" in report.stderr
    assert not (tmp_path / "out").exists()


def test_import_of_unitdist_needs_torch_alone() -> None:
    third_party = {"timm", "safetensors", "yaml", "huggingface_hub", "torchvision", "onnx", "accelerate"}
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {third_party!r}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import unitdist
assert "unitdist.hub" not in sys.modules and unitdist.Unitization2d
try:
    unitdist.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=REPOSITORY)

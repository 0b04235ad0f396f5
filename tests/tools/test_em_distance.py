"""tools/em_distance.py: Algorithm 3 between two checkpoints."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from unitdist.config_file import config_from_dict, config_to_dict
from unitdist.errors import ConfigError
from unitdist.models.build import build_model
from unitdist.train.checkpoint import FORMAT, save_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "em_distance.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("em_distance_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SYNTHETIC = {
    "dataset": "synthetic",
    "loader": "synthetic",
    "image_size_px": 8,
    "synthetic_samples": 128,
    "synthetic_classes": 2,
}
MISSING = {"path": "/no/such/folder", "image_size_px": 8}


def checkpoint(path: Path, norm: str, bias: float, data: dict[str, object] = SYNTHETIC) -> Path:
    """A small net's checkpoint whose final norm is moved by `bias`."""
    config = config_from_dict({"model": {"name": "cifar_resnet20", "num_classes": 2, "norm": norm}, "data": data})
    torch.manual_seed(0)
    model = build_model(config.model, image_size_px=8)
    with torch.no_grad():
        model.get_submodule("final_norm").bias.add_(bias)  # type: ignore[operator, union-attr]
    save_checkpoint(path, {"format": FORMAT, "config": config_to_dict(config), "model": model.state_dict()})
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["em_distance.py", *map(str, arguments)])
    load_script().main()


def test_only_the_layer_that_moved_has_a_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = checkpoint(tmp_path / "old.pt", "unitization", 0.0)
    new = checkpoint(tmp_path / "new.pt", "unitization", 1.0)
    run(monkeypatch, old, new, "--layers", "stem_norm", "final_norm", "--steps", 2)
    distances = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert float(distances["stem_norm"]) == 0.0
    assert float(distances["final_norm"]) != 0.0


def test_two_architectures_are_refused_before_the_data_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = checkpoint(tmp_path / "old.pt", "unitization", 0.0)
    new = checkpoint(tmp_path / "new.pt", "batchnorm", 0.0, MISSING)
    with pytest.raises(
        ConfigError, match=r"different architectures: stem_norm\.alpha is \(16,\) in the old and absent"
    ):
        run(monkeypatch, old, new, "--layers", "stem_norm", "--steps", 2)


def test_a_misspelt_layer_is_refused_before_the_data_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = checkpoint(tmp_path / "one.pt", "unitization", 0.0, MISSING)
    with pytest.raises(ConfigError, match=r"no layer named 'stm_norm' .* nearest are stem_norm"):
        run(monkeypatch, one, one, "--layers", "stm_norm")

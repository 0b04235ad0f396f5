"""torch.export and ONNX: the same logits at the training's size and at another one, without unitdist's operators."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from unitdist.config import ModelConfig
from unitdist.errors import ConfigError
from unitdist.export import export_onnx, export_program
from unitdist.models.build import build_model

sys.path.insert(0, str(Path(__file__).parent))
from trained import disturb_norms  # noqa: E402


def build(name: str, norm: str = "unitization", image_size_px: int = 224) -> nn.Module:
    """Disturbed norms make features, and logits, ten times as large as a trained net's: the classifier takes that back."""
    torch.manual_seed(0)
    config = ModelConfig(name=name, norm=norm, num_classes=10)  # type: ignore[arg-type]
    model = disturb_norms(build_model(config, image_size_px=image_size_px))
    with torch.no_grad():
        model.classifier.weight.mul_(0.1)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def run_onnx(path: Path, x_nchw: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(["logits"], {"images": x_nchw.numpy()})[0]
    return result


def assert_close(found: np.ndarray | torch.Tensor, expected: torch.Tensor) -> None:
    """1e-4 in every logit."""
    found = torch.as_tensor(found)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return build("preact_resnet18")


def test_dynamic_onnx_equals_eager_at_224_and_at_other_sizes(resnet18: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(resnet18, tmp_path / "model.onnx", image_size_px=224)
    for shape in ((1, 3, 224, 224), (2, 3, 160, 192), (1, 3, 301, 75)):
        with torch.no_grad():
            assert_close(run_onnx(path, images(*shape)), resnet18(images(*shape)))
    axes = [axis.dim_param or axis.dim_value for axis in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    operators = {node.domain for node in onnx.load(path).graph.node}
    assert operators <= {"", "ai.onnx"}


def test_fixed_onnx_takes_its_own_size_only(tmp_path: Path) -> None:
    model = build("cifar_resnet20", image_size_px=32)
    path = export_onnx(model, tmp_path / "model.onnx", image_size_px=32, dynamic=False)
    with torch.no_grad():
        assert_close(run_onnx(path, images(1, 3, 32, 32)), model(images(1, 3, 32, 32)))
    shape = [axis.dim_value for axis in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    assert shape == [1, 3, 32, 32]


class FixedSize(nn.Module):
    """Takes images of 8 x 8 only."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(3 * 8 * 8, 2)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        if x_nchw.shape[2:] != (8, 8):
            raise ValueError("8 x 8 only")
        y: torch.Tensor = self.classifier(x_nchw.flatten(1))
        return y


def test_network_of_a_fixed_size_is_refused_as_dynamic(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="FixedSize cannot be exported for any image size; export it with dynamic=False"
    ):
        export_onnx(FixedSize(), tmp_path / "model.onnx", image_size_px=8)
    path = export_onnx(FixedSize(), tmp_path / "model.onnx", image_size_px=8, dynamic=False)
    assert run_onnx(path, images(1, 3, 8, 8)).shape == (1, 2)


@pytest.mark.parametrize("norm", ["unitization", "batchnorm"])
def test_exported_program_equals_eager_and_is_plain_aten(norm: str, tmp_path: Path) -> None:
    model = build("preact_resnet18", norm)
    program = export_program(model, image_size_px=64)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((1, 3, 64, 64), (3, 3, 96, 70)):
        with torch.no_grad():
            assert_close(loaded(images(*shape)), model(images(*shape)))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("unitdist" in target for target in targets)


def test_unfolded_network_exports_with_the_layers_own_operator(resnet18: nn.Module) -> None:
    axes = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    with torch.no_grad():
        program = torch.export.export(resnet18, (images(2, 3, 64, 64),), dynamic_shapes=(axes,))
        assert_close(program.module()(images(1, 3, 96, 70)), resnet18(images(1, 3, 96, 70)))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("unitdist.unitization.default") == 16


def test_missing_onnx_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ConfigError, match=r"pip install -c constraints\.txt -e '\.\[export\]' in the clone of unitdist$"
    ):
        export_onnx(nn.Linear(2, 2), tmp_path / "model.onnx", image_size_px=4)

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from evaluation.checkpoints import following_image_size, load_network, module_network, state_digest
from evaluation.options import EvaluationOptions
from unitdist.errors import CheckpointError, ConfigError
from unitdist.layers import Unitization2d, convert_unitization
from unitdist.train.checkpoint import read_checkpoint

TIMM = "timm:resnet10t"


@pytest.fixture(scope="module")
def timm_net() -> nn.Module:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    return model.eval()


@pytest.fixture
def image_nchw() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, image_nchw: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(image_nchw)


def save(content: Any, folder: Path, name: str = "net.pth") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def test_unitdists_own_brings_classes_and_normalization(checkpoint: Path, small_classes: dict[str, int]) -> None:
    network = load_network(checkpoint, EvaluationOptions())
    assert (network.name, network.norm, network.weights) == ("cifar_resnet20", "unitization", "model")
    assert network.class_to_idx == small_classes
    assert network.mean == (0.485, 0.456, 0.406)
    state = read_checkpoint(checkpoint)["model"]
    assert all(torch.equal(value, state[name]) for name, value in network.model.state_dict().items())
    assert not network.model.training


def test_averaged_weights_are_preferred_unless_told_otherwise(checkpoint: Path, tmp_path: Path) -> None:
    content = read_checkpoint(checkpoint)
    content["model_ema"] = {name: value + 1 if value.is_floating_point() else value for name, value in content["model"].items()}
    path = save(content, tmp_path, "ema.pt")
    for weights, shift in (("auto", 1.0), ("ema", 1.0), ("model", 0.0)):
        network = load_network(path, EvaluationOptions(weights=weights))  # type: ignore[arg-type]
        loaded = network.model.state_dict()
        name = next(name for name in loaded if name.endswith("weight"))
        torch.testing.assert_close(loaded[name], content["model"][name] + shift)
        assert network.weights == ("ema" if shift else "model")


def test_ema_that_is_not_there_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="--weights ema: .* holds no averaged weights"):
        load_network(checkpoint, EvaluationOptions(weights="ema"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"state_dict": {f"_orig_mod.module.{name}": value for name, value in state.items()}},
        lambda state: {"state_dict": {name: value * 0 for name, value in state.items()}, "state_dict_ema": state},
    ],
    ids=["bare", "state_dict", "model", "ddp", "compiled", "ema"],
)
def test_timms_checkpoints(wrap: Any, timm_net: nn.Module, tmp_path: Path, image_nchw: torch.Tensor) -> None:
    path = save(wrap(timm_net.state_dict()), tmp_path)
    network = load_network(path, EvaluationOptions(model=TIMM))
    assert torch.equal(logits(network.model, image_nchw), logits(timm_net, image_nchw))
    assert network.norm == "BatchNorm2d"
    assert network.mean == timm_net.pretrained_cfg["mean"]


def test_timms_checkpoint_names_its_network(timm_net: nn.Module, tmp_path: Path) -> None:
    path = save({"arch": "resnet10t", "state_dict": timm_net.state_dict()}, tmp_path)
    assert load_network(path, EvaluationOptions()).name == TIMM


def test_safetensors(timm_net: nn.Module, tmp_path: Path, image_nchw: torch.Tensor) -> None:
    save_file(timm_net.state_dict(), tmp_path / "net.safetensors")
    network = load_network(tmp_path / "net.safetensors", EvaluationOptions(model=TIMM))
    assert torch.equal(logits(network.model, image_nchw), logits(timm_net, image_nchw))


@pytest.mark.parametrize("zip_format", [True, False])
def test_torchvisions_state_dicts_in_both_formats(tmp_path: Path, image_nchw: torch.Tensor, zip_format: bool) -> None:
    torch.manual_seed(0)
    original = resnet18(num_classes=7).eval()
    torch.save(original.state_dict(), tmp_path / "resnet.pth", _use_new_zipfile_serialization=zip_format)
    network = load_network(tmp_path / "resnet.pth", EvaluationOptions(model="torchvision:resnet18"))
    assert torch.equal(logits(network.model, image_nchw), logits(original, image_nchw))
    assert network.mean == (0.485, 0.456, 0.406)


def test_mean_and_std_can_be_given(timm_net: nn.Module, tmp_path: Path) -> None:
    path = save(timm_net.state_dict(), tmp_path)
    network = load_network(path, EvaluationOptions(model=TIMM, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    assert (network.mean, network.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_a_batchnorm_net_can_be_converted(timm_net: nn.Module, tmp_path: Path, image_nchw: torch.Tensor) -> None:
    path = save(timm_net.state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match="not known .*; give --norm-divisor-from-image-size 224"):
        load_network(path, EvaluationOptions(model=TIMM, convert_unitization=True))
    network = load_network(path, EvaluationOptions(model=TIMM, convert_unitization=True, norm_divisor_from_image_size=64))
    assert any(isinstance(module, Unitization2d) for module in network.model.modules())
    assert network.norm == "unitization (converted)"
    torch.testing.assert_close(logits(network.model, image_nchw), logits(timm_net, image_nchw), atol=1e-5, rtol=1e-4)


def test_a_foreign_unitization_checkpoint_needs_its_norm_divisors(tmp_path: Path, image_nchw: torch.Tensor) -> None:
    import timm

    torch.manual_seed(0)
    model = convert_unitization(timm.create_model("resnet10t", num_classes=5), sync=False).eval()
    for module in model.modules():
        if isinstance(module, Unitization2d):
            module.alpha.data.fill_(0.5)
    state = model.state_dict()
    without = save({name: value for name, value in state.items() if not name.endswith("norm_divisor")}, tmp_path, "a.pth")
    unset = save(state, tmp_path, "b.pth")
    for path in (without, unset):
        message = r"no norm divisors \(first: conv1.1.norm_divisor.*Give --norm-divisor-from-image-size 224"
        with pytest.raises(CheckpointError, match=message):
            load_network(path, EvaluationOptions(model=TIMM))
        network = load_network(path, EvaluationOptions(model=TIMM, norm_divisor_from_image_size=64))
        divisors = [int(value) for name, value in network.model.state_dict().items() if name.endswith("norm_divisor")]
        assert divisors[0] == 32 * 32  # the stem halves the image
        assert min(divisors) == 2 * 2


def test_own_checkpoint_without_norm_divisors_is_refused_with_the_way_out(checkpoint: Path, tmp_path: Path) -> None:
    content = read_checkpoint(checkpoint)
    content["model"] = {name: value for name, value in content["model"].items() if not name.endswith("norm_divisor")}
    path = save(content, tmp_path, "without.pt")
    with pytest.raises(CheckpointError, match=r"has no norm divisors .*Give --norm-divisor-from-image-size 224 \(the training's"):
        load_network(path, EvaluationOptions())
    network = load_network(path, EvaluationOptions(norm_divisor_from_image_size=32))
    original = load_network(checkpoint, EvaluationOptions())
    assert state_digest(network.model) == state_digest(original.model)


@pytest.mark.parametrize(
    ("content", "options", "error", "message"),
    [
        ({"fc.weight": torch.zeros(5, 8)}, {}, ConfigError, "does not say which network it belongs to; give --model"),
        ({"fc.weight": torch.zeros(5, 8)}, {"model": TIMM}, CheckpointError, "belongs to another model: .* missing .* 1 of another"),
        ({"fc.weight": torch.zeros(5, 8)}, {"model": "timm:resnet5000"}, ConfigError, "no model 'resnet5000'"),
        ({"fc.weight": torch.zeros(5, 8)}, {"model": "torchvision:resnet5000"}, ConfigError, "no image classifier 'resnet5000'"),
        ({"fc.weight": torch.zeros(5, 8)}, {"model": "resnet18"}, ConfigError, "unknown model 'resnet18'"),
        ({"head.bias": torch.zeros(5)}, {"model": TIMM}, CheckpointError, "no classifier of timm:resnet10t .* give --num-classes"),
        ({"epoch": 3}, {"model": TIMM}, CheckpointError, "holds no state dict .* found epoch"),
        ([1, 2], {"model": TIMM}, CheckpointError, "holds a list, expected a state dict"),
    ],
)
def test_what_does_not_fit_is_refused(
    content: Any, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = save(content, tmp_path)
    with pytest.raises(error, match=message):
        load_network(path, EvaluationOptions(**options))


def test_own_checkpoint_does_not_take_another_network(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="names its network; leave --model out"):
        load_network(checkpoint, EvaluationOptions(model=TIMM))
    with pytest.raises(ConfigError, match="names its classes; leave --num-classes out"):
        load_network(checkpoint, EvaluationOptions(num_classes=5))


def test_missing_and_damaged_files_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint not found: .*nowhere.pt"):
        load_network(tmp_path / "nowhere.pt", EvaluationOptions())
    for name, content in {"short.pt": checkpoint.read_bytes()[:5000], "text.pt": b"hello", "net.safetensors": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            load_network(tmp_path / name, EvaluationOptions())


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    for zip_format in (True, False):
        torch.save({"model": Exploit()}, tmp_path / "bad.pt", _use_new_zipfile_serialization=zip_format)
        with pytest.raises(CheckpointError):
            load_network(tmp_path / "bad.pt", EvaluationOptions(model=TIMM))
    assert not (tmp_path / "ran").exists()


def test_equal_networks_have_equal_digests(tiny_net: nn.Module) -> None:
    before = state_digest(tiny_net)
    assert before == state_digest(tiny_net)
    tiny_net.norm.alpha.data[3] += 1e-6  # type: ignore[union-attr, operator]
    assert before != state_digest(tiny_net)


def test_a_module_without_norm_divisors_is_refused(tiny_net: nn.Module) -> None:
    unset = nn.Sequential(Unitization2d(3))
    with pytest.raises(CheckpointError, match="norm divisors of Sequential are not known"):
        module_network(unset, EvaluationOptions())
    assert module_network(tiny_net, EvaluationOptions()).norm == "unitization"


def test_per_image_divisors_follow_the_image(tiny_net: nn.Module) -> None:
    image_nchw = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    fixed = logits(tiny_net, image_nchw)
    with following_image_size(tiny_net):
        assert not torch.allclose(logits(tiny_net, image_nchw), fixed, atol=1e-3)
        assert int(tiny_net.norm.norm_divisor) == 24 * 40  # type: ignore[union-attr, arg-type]
    assert torch.equal(logits(tiny_net, image_nchw), fixed)


def test_per_image_divisors_need_a_unitization_layer(timm_net: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no Unitization layer"), following_image_size(timm_net):
        pass

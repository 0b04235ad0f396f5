"""model.init_from: a batch norm checkpoint starts a unitization training as the same function; what does not fit is named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unitdist.config import Config, ModelConfig
from unitdist.config_file import load_config
from unitdist.errors import CheckpointError, ConfigError
from unitdist.models.build import build_model
from unitdist.train.init_from import init_model, read_weights

CONFIG = Path(__file__).resolve().parents[1] / "dist" / "small.yaml"


def config_of(path: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [f"model.init_from={path}", *overrides])


def build(config: Config, **changes: object) -> torch.nn.Module:
    model_config: ModelConfig = replace(config.model, init_from=None, init_head=True, **changes)  # type: ignore[arg-type]
    return build_model(model_config, image_size_px=config.data.image_size_px, sync=False)


def trained_batch_norm_net(config: Config, **changes: object) -> torch.nn.Module:
    torch.manual_seed(1)
    net = build(config, norm="batchnorm", **changes)
    for _ in range(3):  # running statistics of their own
        net(torch.randn(8, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict", "ddp", "safetensors", "averaged"])
def test_batch_norm_checkpoint_starts_as_the_same_function(tmp_path: Path, wrap: str) -> None:
    path = tmp_path / ("net.safetensors" if wrap == "safetensors" else "net.pt")
    config = config_of(path)
    net = trained_batch_norm_net(config)
    state = net.state_dict()
    if wrap == "safetensors":
        save_file(state, path)
    else:
        zeros = {name: torch.zeros_like(value) for name, value in state.items()}
        content = {
            "bare": state,
            "model": {"model": state, "epoch": 3},
            "state_dict": {"state_dict": state, "arch": "x"},
            "ddp": {"module._orig_mod." + name: value for name, value in state.items()},
            "averaged": {"model": zeros, "model_ema": state},
        }[wrap]
        torch.save(content, path)
    unitized = build(config)
    init_model(unitized, read_weights(path), config)
    x_nchw = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(unitized.eval()(x_nchw), net(x_nchw), rtol=1e-4, atol=1e-5)
    divisors = [int(value) for name, value in unitized.state_dict().items() if name.endswith("norm_divisor")]
    assert set(divisors) == {32**2, 16**2, 8**2}
    assert all(not value.any() for name, value in unitized.state_dict().items() if name.endswith("alpha"))


def test_unitization_checkpoint_keeps_its_divisors_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    config = config_of(path)
    other = build_model(replace(config.model, init_from=None), image_size_px=16, sync=False)
    torch.save(other.state_dict(), path)
    for overrides, expected in ((), {16**2, 8**2, 4**2}), (("model.norm_divisor=100",), {100}):
        config = config_of(path, *overrides)
        net = build(config)
        init_model(net, read_weights(path), config)
        assert {int(value) for name, value in net.state_dict().items() if name.endswith("norm_divisor")} == expected


def test_other_classes_start_a_new_classifier_only_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    config = config_of(path)
    net = trained_batch_norm_net(config, num_classes=7)
    torch.save(net.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"another number of classes: .* model\.init_head=false starts"):
        init_model(build(config), read_weights(path), config)
    config = config_of(path, "model.init_head=false")
    fresh = build(config)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    init_model(fresh, read_weights(path), config)
    after = fresh.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    classifier = {name for name in before if before[name].shape != net.state_dict().get(name, before[name]).shape}
    assert len(classifier) == 2 and not classifier & changed and len(changed) > 20


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    config = config_of(path)
    state = trained_batch_norm_net(config).state_dict()
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"belongs to another model: 1 unknown \(first: extra\.weight\)"):
        init_model(build(config), read_weights(path), config)
    del state["extra.weight"]
    missing = next(name for name in state if name.endswith("conv1.weight"))
    del state[missing]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=rf"1 missing \(first: {missing}\)"):
        init_model(build(config), read_weights(path), config)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint not found"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        read_weights(tmp_path / "bad.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_weights(tmp_path / "empty.pt")
    with pytest.raises(ConfigError, match=r"model\.init_head: must be true where model\.init_from is not given"):
        load_config(CONFIG, ["model.init_head=false"])

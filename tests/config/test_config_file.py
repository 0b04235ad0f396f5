"""unitdist.config and config_file: strict, typed, one to one with YAML."""

import dataclasses
from pathlib import Path

import pytest

from unitdist.config import Config, DataConfig
from unitdist.config_file import (
    CONFIG_FOLDER,
    config_from_dict,
    config_to_dict,
    describe_keys,
    dump_config,
    field_meanings,
    load_config,
)
from unitdist.errors import ConfigError


def load_text(tmp_path: Path, text: str, *overrides: str) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_config(file, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  momentun: 0.9\n", r"run\.yaml:2: unknown key optim\.momentun \(did you mean momentum\?\)"),
        ("opti:\n  lr: 1\n", r"run\.yaml:2: unknown section opti \(did you mean optim\?\); sections: run, model"),
        ("optim:\n  lr: '0,1'\n", r"run\.yaml:2: optim\.lr: expected a number, got '0,1'"),
        ("optim:\n  lr: 0.1\n  lr: 0.2\n", r"run\.yaml:3: duplicate key optim\.lr"),
        ("train:\n  compile: on\n", r"run\.yaml:2: train\.compile: expected true or false, got 'on'"),
        ("train:\n  epochs: 1.5\n", r"run\.yaml:2: train\.epochs: expected a whole number, got 1\.5"),
        ("train:\n  epochs: true\n", r"train\.epochs: expected a whole number, got True"),
        ("train:\n  epochs: 0\n", r"run\.yaml:2: train\.epochs: must be >= 1, got 0"),
        ("train:\n\tepochs: 1\n", r"run\.yaml:2: not valid YAML: .*'\\t'"),
        (
            "schedule:\n  name: stepp\n",
            r"schedule\.name: expected one of step, cosine, constant, got 'stepp' \(did you mean step\?\)",
        ),
        ("data:\n  scale_range_px: [256]\n", r"data\.scale_range_px: expected 2 values, got 1"),
        (
            "data:\n  scale_range_px: [128, 480]\n",
            r"data\.scale_range_px: 128 is smaller than the crop data\.image_size_px: 224",
        ),
        (
            "evaluation:\n  scales_px: [200, 256]\n",
            r"evaluation\.scales_px: 200 is smaller than evaluation\.crop_px: 224",
        ),
        (
            "data:\n  loader: resident\n",
            r"data\.loader: resident cannot read data\.dataset: image_folder; allowed: dali, torchvision",
        ),
        ("schedule:\n  warmup_epochs: 5\ntrain:\n  epochs: 5\n", r"schedule\.warmup_epochs: 5 >= train\.epochs: 5"),
        (
            "model:\n  norm: groupnorm\n",
            r"groupnorm needs exactly one of model\.group_norm_groups and model\.group_norm_channels",
        ),
        ("just text\n", r"run\.yaml:1: a config must hold `key: value` lines"),
        ("base: run.yaml\n", r"base: leads back to this file"),
    ],
)
def test_bad_config_is_one_clear_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_text(tmp_path, text)


def test_numbers_are_read_as_a_reader_reads_them(tmp_path: Path) -> None:
    config = load_text(tmp_path, "optim:\n  lr: 5e-5\n  weight_decay: 0\n  clip_norm: 1.\n")
    assert config.optim.lr == 5e-5
    assert config.optim.weight_decay == 0.0 and isinstance(config.optim.weight_decay, float)
    assert config.optim.clip_norm == 1.0


def test_overrides_replace_the_file(tmp_path: Path) -> None:
    config = load_text(
        tmp_path, "train:\n  epochs: 3\n", "train.epochs=7", "optim.lr=1e-3", "data.mean=[0.5, 0.5, 0.5]", "run.name=a"
    )
    assert (config.train.epochs, config.optim.lr, config.data.mean, config.run.name) == (7, 1e-3, (0.5, 0.5, 0.5), "a")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key train\.epoch \(did you mean epochs\?\)"),
        ("train.epochs=many", r"train\.epochs: expected a whole number, got 'many'"),
        ("epochs=3", r"cannot read the argument 'epochs=3'; overrides look like section\.key=value"),
        ("train.epochs", r"overrides look like section\.key=value"),
    ],
)
def test_bad_override_is_one_clear_message(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_text(tmp_path, "", override)


def test_text_keys_take_any_override_as_text(tmp_path: Path) -> None:
    assert load_text(tmp_path, "", "run.name=1", "data.path=2026").run.name == "1"
    assert load_text(tmp_path, "", "run.name=null").run.name == "run"


def test_base_is_replaced_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text("optim:\n  lr: 0.5\n  momentum: 0.8\n")
    config = load_text(tmp_path, "base: parent.yaml\noptim:\n  lr: 0.25\n")
    assert (config.optim.lr, config.optim.momentum) == (0.25, 0.8)


def test_missing_config_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no such config: imagenet_r101_unt\.yaml \(did you mean imagenet_r101_unit\.yaml\?\)"
    ):
        load_config("imagenet_r101_unt.yaml")


def test_a_run_is_named_after_its_file(tmp_path: Path) -> None:
    assert load_text(tmp_path, "").run.name == "run"


def test_dump_reads_back_to_the_same_config(tmp_path: Path) -> None:
    config = load_config("imagenet_r101_unit.yaml", ["optim.clip_norm=0.5", "run.name=a-b c"])
    assert load_text(tmp_path, dump_config(config)) == config
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize("file", sorted(CONFIG_FOLDER.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_loads(file: Path) -> None:
    assert load_config(file).run.name == file.stem


def test_every_key_has_a_meaning() -> None:
    described = describe_keys()
    for section in dataclasses.fields(Config):
        meanings = field_meanings(section.type)  # type: ignore[arg-type]
        for key in dataclasses.fields(section.type):  # type: ignore[arg-type]
            assert len(meanings[key.name]) > 5
            assert f"{section.name}.{key.name} = " in described


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().global_batch_size = 3  # type: ignore[misc]

"""Every option of a run trains: two epochs of a small net in this process, the loss finite and the run complete."""

import json
import math
from pathlib import Path

import pytest

from tests.dist.launching import ROOT
from unitdist.config_file import load_config
from unitdist.errors import ConfigError, TrainingError
from unitdist.train.loop import train

CONFIG = ROOT / "tests" / "dist" / "small.yaml"


def events_of(sample_data: Path, folder: Path, *overrides: str) -> list[dict]:
    shared = [f"data.path={sample_data}", f"run.folder={folder}", "run.name=a"]
    quick = ["train.epochs=1", "train.max_steps=12", "data.global_batch_size=16"]
    run = train(load_config(CONFIG, [*shared, *quick, *overrides]))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=bf16", "optim.clip_norm=1.0"],
        ["train.precision=fp16", "train.channels_last=false"],
        ["train.label_smoothing=0.1", "optim.name=adamw"],
        ["train.mixup_alpha=0.2", "train.cutmix_alpha=1.0", "train.ema_decay=0.9"],
        ["optim.name=lars", "schedule.name=cosine", "schedule.warmup_epochs=0.5"],
        ["optim.name=lamb", "train.accumulation_steps=2"],
        ["model.norm=batchnorm", "run.deterministic=true"],
        ["model.norm=groupnorm", "model.group_norm_groups=4"],
        ["model.norm_scope=pixel", "analysis.every_epochs=1"],
        ["model.name=timm:resnet18"],
    ],
    ids=" ".join,
)
def test_option_trains(sample_data: Path, tmp_path: Path, overrides: list[str]) -> None:
    events = events_of(sample_data, tmp_path, *overrides)
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert len(losses) == 12 and all(math.isfinite(loss) for loss in losses)
    last = events[-1]
    assert last["event"] == "epoch" and last["val_count"] == 80 and 0 <= last["val_top1"] <= last["val_top5"] <= 100
    assert (tmp_path / "a" / "last.pt").exists() and (tmp_path / "a" / "best.pt").exists()
    assert any((tmp_path / "a" / "tensorboard").iterdir())


def test_diverging_run_stops_and_keeps_the_good_checkpoint(sample_data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError,
        match=r"the (loss is (nan|inf)|gradient is not finite \(the loss is\)) at step \d+ .*lower optim\.lr",
    ):
        events_of(sample_data, tmp_path, "optim.lr=1e20")
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert status["state"] == "failed" and "lower optim.lr" in status["reason"]
    assert not (tmp_path / "a" / "last.pt").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.precision=fp16"], r"train\.precision: fp16 is not offered with train\.engine: deepspeed"),
        (["train.zero_stage=1", "optim.name=lars"], r"optim\.name: lars needs whole tensors, ZeRO 1 flattens them"),
        (["train.zero_stage=3", "train.ema_decay=0.9"], r"train\.ema_decay: not with train\.zero_stage: 3"),
    ],
)
def test_what_deepspeed_would_get_wrong_is_refused(
    sample_data: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        events_of(sample_data, tmp_path, "train.engine=deepspeed", *overrides)

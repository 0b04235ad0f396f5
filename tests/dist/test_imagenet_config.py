"""The paper's configuration as it stands, on the sample data: the real ResNet-101 at 224 pixels."""

import json
from pathlib import Path

import pytest

from tests.dist.launching import torchrun, train


def test_imagenet_r101_unit_takes_steps_on_two_ranks(sample_data: Path, tmp_path: Path) -> None:
    done = train(
        torchrun(2), "--config", "imagenet_r101_unit.yaml", f"data.path={sample_data}", f"run.folder={tmp_path}", "model.num_classes=16",
        "data.global_batch_size=4", "train.max_steps=2", "train.log_every_steps=1", "data.num_threads=1", "evaluation.protocols=[]",
        timeout_s=290,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "preact_resnet101 (unitization, " in done.stdout
    events = [json.loads(line) for line in (tmp_path / "imagenet_r101_unit" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 2]
    assert all(event["lr"] == pytest.approx(0.01) and 0 < event["loss"] < 1e4 for event in events)

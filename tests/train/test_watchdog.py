"""How long a training's parts may take before the watchdog calls them stuck."""

from pathlib import Path

import pytest

from tests.faults.test_checkpoint_faults import config
from unitdist.train import epoch
from unitdist.train.loop import train

FIRST, USUAL = 900, 300


def test_first_batches_of_training_validation_and_each_image_size_have_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the network may be compiled anew, seen from its own forward: the limit that holds there."""
    limits: dict[str, list[float | None]] = {"training": [], "validation": []}
    real = epoch.take_step

    def take_step(run, watcher, batches):
        if run.state.step == 0:
            run.engine.module.register_forward_pre_hook(
                lambda *_: limits[run.watchdog.mark.phase].append(run.watchdog.mark.limit_s)
            )
        real(run, watcher, batches)

    monkeypatch.setattr(epoch, "take_step", take_step)
    stages = "data.progressive_resizing=[[1,8],[2,16],[4,12]]"
    limit = [f"health.stuck_after_s={USUAL}", f"health.stuck_after_first_s={FIRST}"]
    train(config(tmp_path, stages, "train.epochs=4", *limit))  # 8 steps an epoch, 2 batches a validation
    once = [FIRST] + [USUAL] * 7
    assert limits["training"] == once + once + [USUAL] * 8 + once
    assert limits["validation"] == [FIRST] + [USUAL] * 7

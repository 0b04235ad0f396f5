"""unitdist.train.loop: what ends an epoch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from unitdist.errors import TrainingError
from unitdist.train.loop import measure_shift


def test_activations_that_are_not_finite_end_the_run_with_epoch_checkpoint_and_remedy(tmp_path: Path) -> None:
    def measure(model: nn.Module) -> None:
        raise TrainingError("layer3.norm: 5 of 9 activations are NaN or infinite; no moment is defined")

    run = SimpleNamespace(
        engine=SimpleNamespace(module=nn.Identity()),
        state=SimpleNamespace(epoch=2),
        folder=SimpleNamespace(last=tmp_path / "last.pt"),
    )
    expected = "the live monitor after epoch 2: layer3.norm: 5 of 9 .*; the last checkpoint is none; lower optim.lr"
    with pytest.raises(TrainingError, match=expected):
        measure_shift(run, SimpleNamespace(measure=measure))
    run.folder.last.touch()
    with pytest.raises(TrainingError, match=f"the last checkpoint is {tmp_path / 'last.pt'}"):
        measure_shift(run, SimpleNamespace(measure=measure))

"""`train.cuda_graph` on a GPU: recorded steps against eager ones, from the config to the checkpoint."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the trainer needs accelerate")

from tests.dist.launching import ROOT  # noqa: E402
from unitdist.config_file import load_config  # noqa: E402
from unitdist.train.loop import train  # noqa: E402
from unitdist.train.step_graph import CudaRecorder, StepGraph  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = [
    "data.dataset=synthetic", "data.loader=synthetic", "data.augmentation=none", "data.synthetic_samples=160",
    "data.synthetic_classes=16", "optim.lr=1e-3", "optim.clip_norm=1.0", "schedule.name=cosine", "train.ema_decay=0.9",
    "run.deterministic=true",
]  # fmt: skip


def losses_of(folder: Path, name: str, *overrides: str, resume: str | None = None) -> torch.Tensor:
    config = load_config(
        ROOT / "tests" / "dist" / "small.yaml", [f"run.folder={folder}", f"run.name={name}", *SETTINGS, *overrides]
    )
    run = train(config, resume=resume)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([event["loss"] for event in events if event["event"] == "train"])


@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "bf16"), ("adamw", "fp32")])
def test_recorded_steps_have_the_losses_and_weights_of_eager_ones(
    tmp_path: Path, optimizer: str, precision: str
) -> None:
    options = [f"optim.name={optimizer}", f"train.precision={precision}"]
    eager = losses_of(tmp_path, "eager", *options)
    recorded = losses_of(tmp_path, "recorded", *options, "train.cuda_graph=true")
    assert len(eager) == 20
    tolerance = 1e-4 if precision == "fp32" else 2e-2  # the optimizer's fused form rounds otherwise; bf16 amplifies it
    torch.testing.assert_close(recorded, eager, rtol=tolerance, atol=0)
    have, want = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("recorded", "eager"))
    for part in ("model", "model_ema"):
        for name, value in want[part].items():
            torch.testing.assert_close(have[part][name].float(), value.float(), rtol=tolerance, atol=tolerance)


def test_a_recorded_run_resumed_within_an_epoch_equals_an_undisturbed_one(tmp_path: Path) -> None:
    whole = losses_of(tmp_path, "whole", "train.cuda_graph=true")
    losses_of(tmp_path, "resumed", "train.cuda_graph=true", "train.max_steps=7")
    resumed = losses_of(tmp_path, "resumed", "train.cuda_graph=true", resume="auto")
    torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=0)


def test_dropout_draws_anew_at_every_replay_and_as_the_eager_run(tmp_path: Path) -> None:
    device = torch.device("cuda")
    kept = torch.zeros(64, device=device)
    graph = StepGraph(lambda x: kept.copy_(torch.nn.functional.dropout(x, 0.5)), CudaRecorder(device))
    x = torch.ones(64, device=device)
    seen = []
    for step in range(6):
        torch.manual_seed(step)
        graph.run(x)
        torch.manual_seed(step)
        assert torch.equal(kept, torch.nn.functional.dropout(x, 0.5)), step
        seen.append(kept.clone())
    assert not torch.equal(seen[-1], seen[-2])

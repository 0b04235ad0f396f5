"""From a run to a checkpoint and back."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitdist.config_file import config_to_dict
from unitdist.errors import CheckpointError, TrainingError
from unitdist.train import engine as engines
from unitdist.train.agreement import agreed
from unitdist.train.checkpoint import FORMAT, save_checkpoint
from unitdist.train.resume import job_fingerprint
from unitdist.train.state import Run, TrainState


def save(run: Run, path: Path) -> None:
    """Gather on every rank, write on rank 0."""
    engine, state = run.engine, run.state
    windows = engine.gather_over_ranks(run.sums.window).cpu()
    model = engines.model_state(engine)
    broken = [name for name, value in model.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    with agreed(engine.world):  # running statistics of their own can be broken on one rank alone
        if broken:
            raise TrainingError(f"{broken[0]} is not finite at step {state.step}; nothing was saved over {path}")
    checkpoint = {
        "format": FORMAT,
        "config": config_to_dict(run.config),
        "model": model,
        "model_ema": None if run.average is None else {name: value.cpu() for name, value in run.average.state.items()},
        "optimizer": engines.optimizer_state(engine),
        "scaler": None if engine.scaler is None else engine.scaler.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "samples": state.samples,
        "rng": {"seed": run.config.run.seed},
        "loader": job_fingerprint(run.config, run.train_loader, world_size=engine.world.size),
        "partial": {"windows": windows, "epoch": list(run.sums.epoch)},
        "monitor": None if run.monitor is None else run.monitor.state(),
        "class_to_idx": dict(run.train_loader.class_to_idx),
        "metrics": state.metrics,
        "versions": {
            "unitdist": version("unitdist"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "world_size": engine.world.size,
        },
    }
    with agreed(engine.world):
        if engine.world.is_main:
            save_checkpoint(path, checkpoint)


def load(run: Run, checkpoint: dict[str, Any]) -> None:
    """Continue where the checkpoint was taken. The network's weights were loaded before the engine wrapped it."""
    engine = run.engine
    engines.load_optimizer_state(engine, checkpoint["optimizer"])
    if engine.scaler is not None and checkpoint["scaler"] is not None:
        engine.scaler.load_state_dict(checkpoint["scaler"])
    if run.average is not None:
        if checkpoint["model_ema"] is None:
            raise CheckpointError(
                "train.ema_decay is set, but the checkpoint holds no averaged weights; resume without it"
            )
        run.average.load(checkpoint["model_ema"])
    if run.monitor is not None and checkpoint["monitor"] is not None:
        run.monitor.load_state(checkpoint["monitor"])
    run.state = TrainState(
        epoch=checkpoint["epoch"], step=checkpoint["step"], samples=checkpoint["samples"], metrics=checkpoint["metrics"]
    )
    windows: Tensor = checkpoint["partial"]["windows"]
    run.sums.epoch = list(checkpoint["partial"]["epoch"])
    if len(windows) == engine.world.size:
        run.sums.window.copy_(windows[engine.world.rank])
    elif engine.world.is_main:
        run.sums.window.copy_(windows.sum(0))

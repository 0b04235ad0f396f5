"""From a run to a checkpoint and back."""

import copy
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from unitdist.config_file import config_to_dict
from unitdist.errors import CheckpointError, TrainingError
from unitdist.train import engine as engines
from unitdist.train.agreement import agreed
from unitdist.train.checkpoint import FORMAT, readable_bytes, save_checkpoint, sync_folder
from unitdist.train.resume import job_fingerprint
from unitdist.train.retention import epoch_file, give_name, remove_old, step_file
from unitdist.train.state import Run, TrainState
from unitdist.train.writer import Stall
from unitdist.version import __version__


def save(run: Run) -> None:
    """Gather on every rank and copy to host memory; rank 0 then writes it, beside the training where that was asked for.

    Returns when the copy is taken. A write that fails is told and counted by `run.writer`, and what was saved before stays.
    Raises TrainingError, on all ranks, when a weight, statistic or buffer of the optimizer is not finite: nothing is written then.
    """
    run.watchdog.enter("checkpoint", run.state.step)
    with Stall(run.writer):
        started = time.perf_counter()
        if run.engine.world.is_main:
            run.writer.wait()  # one write at a time, and no second copy in memory
        checkpoint = staged(run)
        if run.engine.world.is_main:
            write = _writing(run, checkpoint, stalled_s=time.perf_counter() - started)
            run.writer.start(write, step=run.state.step)


def wait_for_saves(run: Run) -> None:
    """Until everything saved is durable. Raises CheckpointError, on all ranks, when the newest save failed."""
    run.watchdog.enter("checkpoint", run.state.step)
    with agreed(run.engine.world):
        if run.engine.world.is_main:
            with Stall(run.writer):
                run.writer.wait()
            if run.writer.failure is not None:
                raise run.writer.failure


def staged(run: Run) -> dict[str, Any]:
    """All that a checkpoint holds (see `checkpoint`), copied: training may go on. Collective; complete on rank 0."""
    engine, state = run.engine, run.state
    windows = engine.gather_over_ranks(run.sums.window).cpu()
    weights: dict[str, Any]
    if engine.world.is_main or engine.shards_state:
        average = None if run.average is None else run.average.state
        weights = {
            "model": engines.model_state(engine),
            "model_ema": None
            if average is None
            else {name: value.to("cpu", copy=True) for name, value in average.items()},
            "optimizer": engines.optimizer_state(engine),
        }
    else:  # rank 0's copy is enough; what can differ from it is checked where it lies
        assert engine.module is not None
        weights = {"model": engine.module.state_dict()}
    broken = _first_not_finite(weights)
    with agreed(engine.world):  # running statistics of their own can be broken on one rank alone
        if broken is not None:
            raise TrainingError(
                f"{broken} is not finite at step {state.step}; nothing was saved over {run.folder.last}"
            )
    return {
        "format": FORMAT,
        "config": config_to_dict(run.config),
        **weights,
        "scaler": None if engine.scaler is None else engine.scaler.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "samples": state.samples,
        "rng": {"seed": run.config.run.seed},
        "loader": job_fingerprint(run.config, run.train_loader, world_size=engine.world.size),
        "partial": {"windows": windows, "epoch": list(run.sums.epoch)},
        "monitor": None if run.monitor is None else copy.deepcopy(run.monitor.state()),
        "class_to_idx": dict(run.train_loader.class_to_idx),
        "metrics": copy.deepcopy(state.metrics),
        "versions": {
            "unitdist": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "world_size": engine.world.size,
        },
    }


def _first_not_finite(tree: Any) -> str | None:
    """Dotted name of the first tensor in `tree` that holds an inf or a nan, read from the device once."""
    named = [(name, value) for name, value in _named_tensors(tree, "") if value.is_floating_point() and value.numel()]
    # A nan stays a nan in the extremes; on the CPU this is a tenth of the cost of isfinite() or a norm.
    extremes = [torch.stack(value.detach().aminmax()).double() for _, value in named]
    finite = torch.stack(extremes).isfinite().all(1).tolist()
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), None)


def _named_tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _named_tensors(value, f"{name}.{key}" if name else str(key))


def _writing(run: Run, checkpoint: dict[str, Any], *, stalled_s: float) -> Callable[[], None]:
    """The work of the writer: the step file, its other names, and then, when all that is durable, the removal of old ones."""
    folder, config, progress = run.folder, run.config.checkpoint, run.progress
    step, ranking = checkpoint["step"], checkpoint["metrics"].get("ranking", [])
    names = [folder.last]
    if ranking and ranking[0]["step"] == step:
        names.append(folder.best)
    at_epochs_end = checkpoint["samples"] == 0
    if config.keep_every_epochs and at_epochs_end and checkpoint["epoch"] % config.keep_every_epochs == 0:
        names.append(epoch_file(folder.path, checkpoint["epoch"]))

    def write() -> None:
        started = time.perf_counter()
        path = step_file(folder.path, step)
        save_checkpoint(path, checkpoint)
        try:
            for name in names:
                give_name(path, name)
            sync_folder(folder.path)
            best_steps = [entry["step"] for entry in ranking[: config.keep_best]]
            remove_old(folder.path, newest_step=step, keep_last=config.keep_last, best_steps=best_steps)
        except OSError as error:
            raise CheckpointError(
                f"{path} is written, but {folder.last} and the old checkpoints could not be brought up to date: {error}"
            ) from error
        if progress is not None:
            progress.say(
                f"saved {path.name} ({readable_bytes(path.stat().st_size)}): training stood still for {stalled_s:.2f} s, "
                f"written in {time.perf_counter() - started:.2f} s"
            )

    return write


def load(run: Run, checkpoint: dict[str, Any]) -> None:
    """Continue where the checkpoint was taken. The network's weights were loaded before the engine wrapped it."""
    engine = run.engine
    restore(run, checkpoint)
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


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Optimizer, loss scaler and averaged weights of the checkpoint; the network's weights are the caller's."""
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

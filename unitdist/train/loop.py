"""The training run: build, resume, epochs, validate, save."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from unitdist.analysis.monitor import Shift, ShiftMonitor
from unitdist.config import Config
from unitdist.errors import TrainingError
from unitdist.train import engine as engines
from unitdist.train.agreement import from_rank_zero, lost_contact
from unitdist.train.batch_split import split_batch
from unitdist.train.build_run import build_run
from unitdist.train.epoch import train_epoch
from unitdist.train.health import Watch
from unitdist.train.run_folder import note_failure, write_status
from unitdist.train.saving import save, wait_for_saves
from unitdist.train.state import Run, learning_rate_of_step
from unitdist.train.stopping import Stopped
from unitdist.train.validate import broadcast_running_statistics, validate
from unitdist.wording import counted
from unitdist.world import World


def train(config: Config, *, resume: str | None = None) -> Path:
    """Train as the config says; returns the run's folder. Called on every rank of the job.

    `resume`: None starts anew, "auto" continues from the folder's newest whole checkpoint if it holds any, a path from that one.
    Ranks that torchrun has restarted always continue from the job's own newest checkpoint, whatever the command said.
    Raises UnitdistError. The process group stays for the caller; `engine.stop_engine` ends it.
    """
    world = World.from_environment()
    split = split_batch(config, world)
    engine = engines.start_engine(config, world)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        resume = "auto"
    with ExitStack() as resources:
        run = build_run(config, engine, split, resume, resources)
        try:
            run_to_its_end(run)
        except Stopped as stopped:
            error = Stopped(f"stopped at step {run.state.step} ({stopped}), saved; go on with --resume auto")
            error.speaker = 0
            run.watchdog.failed(error, lost_contact=False)
            raise error from None
        except Exception as error:
            run.watchdog.failed(error, lost_contact=isinstance(error, RuntimeError) and lost_contact(error))
            note_failure(run.folder.path, world, error, step=run.state.step)
            raise
        if world.is_main:
            state = "evaluating" if config.evaluation.protocols else "finished"  # the caller evaluates
            write_status(run.folder.path, state, step=run.state.step)
        run.watchdog.finished()
        if run.board is not None:
            run.board.finish()
    engine.barrier()
    return run.folder.path


def run_to_its_end(run: Run) -> None:
    """All that is left to do, saved and durable; so it is too where Stopped is raised, on all ranks after the same step."""
    begun = False
    try:
        run.stop.check_now()
        begun = True
        run_epochs(run)
    except Stopped:
        save_where_stopped(run, begun=begun)
        raise
    wait_for_saves(run)


def run_epochs(run: Run) -> None:
    """Train, validate and save. Raises Stopped when a rank was asked to stop."""
    if run.state.step >= run.total_steps and run.progress:
        run.progress.say(f"already finished: step {run.state.step} of {run.total_steps}; raise train.epochs to go on")
    assert run.engine.module is not None
    watcher = Watch(run.config.health, run.engine.module, run.sums)
    while run.state.step < run.total_steps:
        timing = train_epoch(run, watcher)
        if run.state.samples:  # train.max_steps ended the run within an epoch
            save(run)
        else:
            finish_epoch(run, timing)


def save_where_stopped(run: Run, *, begun: bool) -> None:
    """A stop during validation is saved as before the end of its epoch: the resumed run validates again.

    `begun` False: a stop before the first step of this start; an epoch that is finished then was validated by an earlier one.
    """
    state = run.state
    if begun and state.samples == 0 and state.step:
        state.epoch, state.samples = state.epoch - 1, run.steps_per_epoch * run.config.data.global_batch_size
    save(run)
    wait_for_saves(run)
    if run.engine.world.is_main:
        write_status(run.folder.path, "stopped", step=state.step)


def finish_epoch(run: Run, timing: dict[str, float]) -> None:
    """Validate, measure, report and save, as often as the config asks; always after the last epoch."""
    config, state, engine = run.config, run.state, run.engine
    last_epoch = state.step >= run.total_steps
    record: dict[str, Any] = {
        "epoch": state.epoch,
        "step": state.step,
        "lr": learning_rate_of_step(run, state.step - 1),
    } | train_means(run)
    broadcast_running_statistics(engine)
    among_best = (last_epoch or state.epoch % config.evaluation.every_epochs == 0) and validate_epoch(run, record)
    if run.monitor is not None and run.monitor.is_due(state.epoch):
        run.watchdog.enter("analysis", state.step, watched=False)  # Alg. 3 alone may take minutes
        shift = measure_shift(run, run.monitor)
        record |= shift.metrics
        if run.board:
            run.board.histograms(shift.histograms, state.step)
            run.board.picture("analysis/layers", shift.picture, state.step)
    report_epoch(run, record | timing)
    run.sums.start_epoch()
    if last_epoch or among_best or saving_is_due(run):
        save(run)


def measure_shift(run: Run, monitor: ShiftMonitor) -> Shift:
    """What the monitor sees. Raises TrainingError, with the remedy, for activations that are not finite."""
    assert run.engine.module is not None
    try:
        return monitor.measure(run.engine.module)
    except TrainingError as error:
        remedied = TrainingError(
            f"the live monitor after epoch {run.state.epoch}: {error}; "
            f"the last checkpoint is {run.folder.last if run.folder.last.exists() else 'none'}; "
            "lower optim.lr, or add warm-up (analysis.every_epochs=0 trains without the monitor)"
        )
        remedied.speaker = error.speaker
        raise remedied from error


def validate_epoch(run: Run, record: dict[str, Any]) -> bool:
    """Validate the weights, and the averaged ones where there are any; True where the epoch is among the `keep_best` best.

    The averaged weights, where kept, decide which epoch is best; of equal ones the earlier.
    """
    run.watchdog.enter("validation", run.state.step)
    result = validate(run.engine, run.val_loader, stop=run.stop, watchdog=run.watchdog)
    record |= {f"val_{key}": value for key, value in result.items()}
    decisive = result
    if run.average is not None:
        decisive = validate(run.engine, run.val_loader, stop=run.stop, watchdog=run.watchdog, state=run.average.state)
        record |= {f"val_ema_{key}": value for key, value in decisive.items()}
    state, metrics = run.state, run.state.metrics
    metrics["last"] = {"epoch": state.epoch, **decisive}
    best = metrics.get("best")
    # A checkpoint of version 0.1.0 knows its best epoch, and no file of it but best.pt.
    old = [] if best is None else [{"epoch": best["epoch"], "step": 0, "top1": best["top1"]}]
    entry = {"epoch": state.epoch, "step": state.step, "top1": decisive["top1"]}
    lost = from_rank_zero(run.engine.world, lambda: run.writer.lost_steps)
    saved = [one for one in metrics.get("ranking", old) if one["step"] not in lost]
    ranking = sorted([*saved, entry], key=lambda one: (-one["top1"], one["epoch"]))
    metrics["ranking"] = ranking[: run.config.checkpoint.keep_best]
    if metrics["ranking"][0] is entry:
        metrics["best"] = {"epoch": state.epoch, **decisive}
    return entry in metrics["ranking"]


def train_means(run: Run) -> dict[str, float]:
    loss_sum, correct, count = run.sums.epoch
    if count == 0:
        raise TrainingError(f"every step of epoch {run.state.epoch} was left out (health.on_nonfinite)")
    return {"train_loss": loss_sum / count, "train_top1": 100 * correct / count}


def report_epoch(run: Run, record: dict[str, Any]) -> None:
    if run.record is None or run.progress is None or run.board is None:
        return
    run.record.write("epoch", record)
    for split in ("train", "val_ema", "val"):
        values = {key.removeprefix(f"{split}_"): value for key, value in record.items() if key.startswith(f"{split}_")}
        if split == "val":
            values = {key: value for key, value in values.items() if not key.startswith("ema_")}
        run.board.scalars("epoch/train" if split == "train" else split, values, run.state.step)
    run.board.scalars("", {key: value for key, value in record.items() if key.startswith("analysis/")}, run.state.step)
    run.board.flush()
    if "val_top1" in record:
        averaged = f" (averaged weights {record['val_ema_top1']:.2f})" if "val_ema_top1" in record else ""
        run.progress.say(
            f"epoch {record['epoch']}: train loss {record['train_loss']:.4f}, validation top-1 {record['val_top1']:.2f} top-5 "
            f"{record['val_top5']:.2f} on {counted(record['val_count'], 'image')}{averaged}"
        )


def saving_is_due(run: Run) -> bool:
    """At an epoch's end: by epochs, or because the epoch's last step is due by steps."""
    checkpoint = run.config.checkpoint
    by_steps = checkpoint.every_steps is not None and run.state.step % checkpoint.every_steps == 0
    for_ever = checkpoint.keep_every_epochs is not None and run.state.epoch % checkpoint.keep_every_epochs == 0
    return run.state.epoch % checkpoint.every_epochs == 0 or by_steps or for_ever

"""One epoch of training: steps, micro-batches, and the log line between them."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from unitdist.data.batch import Batch
from unitdist.data.progressive import side_changes
from unitdist.errors import TrainingError
from unitdist.train import engine as engines
from unitdist.train.agreement import warn
from unitdist.train.batches_ahead import BatchesAhead
from unitdist.train.health import Watch, check_same_parameters
from unitdist.train.metrics import Stopwatch
from unitdist.train.nonfinite_batch import prepare
from unitdist.train.progress import eta
from unitdist.train.saving import save
from unitdist.train.state import Run, learning_rate_of_step
from unitdist.train.step_graph import CudaRecorder, StepGraph


def train_epoch(run: Run, watcher: Watch) -> dict[str, float]:
    """The rest of the current epoch, or up to `train.max_steps`; returns its timing."""
    config, state, engine = run.config, run.state, run.engine
    watch = Stopwatch()
    assert engine.model is not None
    engine.model.train()
    if config.train.cuda_graph and run.step_graph is None:
        run.step_graph = StepGraph(partial(compute_whole_step, run), CudaRecorder(engine.device))
    steps_done = state.samples // config.data.global_batch_size
    new_side = side_changes(config.data, state.epoch)  # pipelines are built anew, the network may be compiled anew
    run.watchdog.enter("data", state.step, first=new_side)
    batches = BatchesAhead(
        run.train_loader,
        engine.world,
        run.stop,
        watch,
        epoch=state.epoch,
        start_sample=state.samples,
        steps=min(run.steps_per_epoch - steps_done, run.total_steps - state.step),
        accumulation_steps=config.train.accumulation_steps,
    )
    while state.samples // config.data.global_batch_size < run.steps_per_epoch:
        if state.step >= run.total_steps:
            break
        engines.set_learning_rate(engine, learning_rate_of_step(run, state.step))
        torch.manual_seed(step_seed(config.run.seed, state.step, engine.world.rank))
        run.watchdog.enter("training", state.step, first=new_side)
        new_side = False
        take_step(run, watcher, batches.take())
        state.step += 1
        state.samples += config.data.global_batch_size
        watch.images += config.data.global_batch_size
        epoch_ends = state.samples // config.data.global_batch_size == run.steps_per_epoch
        if run.progress:
            run.progress.step()
        if state.step % config.train.log_every_steps == 0 or epoch_ends or state.step == run.total_steps:
            log_window(run, watch, watcher)
        if config.health.checksum_every_steps and state.step % config.health.checksum_every_steps == 0:
            check_same_parameters(run)
        if config.checkpoint.every_steps and state.step % config.checkpoint.every_steps == 0 and not epoch_ends:
            save(run)
        run.writer.poll()
        if run.writer.gives_up is not None:
            run.stop.fail(run.writer.gives_up)
        run.watchdog.enter("data", state.step)
        batches.refill()
        run.watchdog.enter("training", state.step)
        run.stop.check()
    batches.close()
    if state.samples // config.data.global_batch_size == run.steps_per_epoch:
        state.epoch, state.samples = state.epoch + 1, 0
    return watch.timing()


def take_step(run: Run, watcher: Watch, batches: list[Batch]) -> None:
    """Forward and backward of a step's micro-batches, and its update, unless `watcher` has it left out."""
    if run.step_graph is not None:
        for micro_step, batch in enumerate(batches):
            run.step_graph.run(*prepare(run, batch, micro_step))
        return
    judged = run.config.health.every_step and not run.engine.uses_deepspeed
    if judged:
        watcher.before.keep()
    losses = [train_on(run, batch, micro_step) for micro_step, batch in enumerate(batches)]
    found = watcher.judge(run.engine, losses) if judged else None
    if found is not None:
        watcher.handle(run, batches, found)
        return
    engines.update(run.engine, clip_norm=run.config.optim.clip_norm)
    average_weights(run)
    watcher.sound()


def train_on(run: Run, batch: Batch, micro_step: int) -> Tensor:
    """Forward and backward of one micro-batch; its mean loss on the device."""
    return compute(run, *prepare(run, batch, micro_step))


def compute(run: Run, images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The device's part of `train_on`: nothing is read back to the host.

    images: (N, C, H, W). labels: hard labels (N,), for the metrics. targets: labels or soft labels (N, classes).
    """
    engine, config = run.engine, run.config
    assert engine.model is not None
    with engines.accumulating(engine):
        with engine.autocast():
            logits = engine.model(images)
        smoothing = 0.0 if run.mixup is not None else config.train.label_smoothing
        loss = nn.functional.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        engines.backward(engine, loss)
    run.sums.add(loss, logits, labels)
    return loss.detach()


def compute_whole_step(run: Run, images: Tensor, labels: Tensor, targets: Tensor) -> None:
    """What a recorded step consists of: `compute`, the update and the averaging of the weights."""
    compute(run, images, labels, targets)
    engines.update(run.engine, clip_norm=run.config.optim.clip_norm)
    average_weights(run)


def average_weights(run: Run) -> None:
    if run.average is not None:
        assert run.engine.module is not None
        run.average.update(run.engine.module)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generators for one step of one rank (dropout and the like)."""
    return (seed * 1_000_003 + step * 8191 + rank) % 2**63


def log_window(run: Run, watch: Stopwatch, watcher: Watch) -> None:
    """Read the sums since the last log line from the device, and tell them."""
    state, config = run.state, run.config
    means = run.sums.fold(run.engine.sum_over_ranks(run.sums.window.clone()))
    if means is None:  # every step of the window was left out
        return
    loss, top1 = means
    if not math.isfinite(loss):
        error = TrainingError(
            f"the loss is {loss} at step {state.step} (epoch {state.epoch + 1}, lr {learning_rate_of_step(run, state.step - 1):g}); "
            f"the last checkpoint is {run.folder.last if run.folder.last.exists() else 'none'}; lower optim.lr, or add warm-up"
        )
        error.speaker = 0  # the sum is over all ranks, so all of them know
        raise error
    usual = watcher.spikes.note(loss)
    if run.record is None or run.progress is None or run.board is None:
        return
    if usual is not None:
        warn(run.engine.world, f"loss spike: {loss:.4g} at step {state.step}, median of the windows before {usual:.4g}")
    timing = watch.timing()
    rate = watch.images / config.data.global_batch_size / watch.seconds
    values = {
        "epoch": state.epoch + 1,
        "step": state.step,
        "loss": loss,
        "top1": top1,
        "lr": learning_rate_of_step(run, state.step - 1),
        **timing,
        "save_stall_s": round(run.writer.stall_s, 3),
    }
    run.writer.stall_s = 0.0
    run.record.write("train", values)
    run.board.scalars("train", {"loss": loss, "top1": top1}, state.step)
    run.board.scalars(
        "",
        {
            "lr": values["lr"],
            "throughput/images_per_s": timing["images_per_s"],
            "throughput/data_wait_share": timing["data_wait_share"],
            "throughput/save_stall_s": values["save_stall_s"],
        },
        state.step,
    )
    remaining = eta((run.total_steps - state.step) / rate)
    text = f"loss {loss:.4f} top1 {top1:.2f} lr {values['lr']:.4g} {timing['images_per_s']:.1f} images/s"
    run.progress.note(text)
    run.progress.say(
        f"epoch {state.epoch + 1}/{config.train.epochs} step {state.step}/{run.total_steps} {text} ETA {remaining}"
    )

"""One epoch of training: steps, micro-batches, and the log line between them."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from unitdist.data.batch import Batch
from unitdist.errors import TrainingError
from unitdist.train import engine as engines
from unitdist.train.batches_ahead import BatchesAhead
from unitdist.train.metrics import Stopwatch
from unitdist.train.progress import eta
from unitdist.train.saving import save
from unitdist.train.state import Run, learning_rate_of_step
from unitdist.train.step_graph import CudaRecorder, StepGraph
from unitdist.train.timm_training import mix


def train_epoch(run: Run) -> dict[str, float]:
    """The rest of the current epoch, or up to `train.max_steps`; returns its timing."""
    config, state, engine = run.config, run.state, run.engine
    watch = Stopwatch()
    assert engine.model is not None
    engine.model.train()
    if config.train.cuda_graph and run.step_graph is None:
        run.step_graph = StepGraph(partial(compute_whole_step, run), CudaRecorder(engine.device))
    steps_done = state.samples // config.data.global_batch_size
    run.watchdog.enter("data", state.step)
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
        run.watchdog.enter("training", state.step)
        for micro_step, batch in enumerate(batches.take()):
            train_on(run, batch, micro_step)
        state.step += 1
        state.samples += config.data.global_batch_size
        watch.images += config.data.global_batch_size
        if run.step_graph is None:
            average_weights(run)
        epoch_ends = state.samples // config.data.global_batch_size == run.steps_per_epoch
        if run.progress:
            run.progress.step()
        if state.step % config.train.log_every_steps == 0 or epoch_ends or state.step == run.total_steps:
            log_window(run, watch)
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


def train_on(run: Run, batch: Batch, micro_step: int) -> None:
    """Forward, backward and, on the last micro-batch of a step, the update."""
    engine, config = run.engine, run.config
    images = batch.images.to(engine.device, non_blocking=True)
    labels = batch.labels.to(engine.device, non_blocking=True)
    targets = labels
    if run.mixup is not None:
        seed = (config.run.seed, run.state.step, micro_step, engine.world.rank)
        images, targets = mix(run.mixup, images, labels, seed=seed)
    if run.step_graph is not None:
        run.step_graph.run(images, labels, targets)
    else:
        compute(run, images, labels, targets)


def compute(run: Run, images: Tensor, labels: Tensor, targets: Tensor) -> None:
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
        engines.backward_and_step(engine, loss, clip_norm=config.optim.clip_norm)
    run.sums.add(loss, logits, labels)


def compute_whole_step(run: Run, images: Tensor, labels: Tensor, targets: Tensor) -> None:
    """What a recorded step consists of: `compute` and the averaging of the weights."""
    compute(run, images, labels, targets)
    average_weights(run)


def average_weights(run: Run) -> None:
    if run.average is not None:
        assert run.engine.module is not None
        run.average.update(run.engine.module)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generators for one step of one rank (dropout and the like)."""
    return (seed * 1_000_003 + step * 8191 + rank) % 2**63


def log_window(run: Run, watch: Stopwatch) -> None:
    """Read the sums since the last log line: the only synchronization with the device between saves."""
    state, config = run.state, run.config
    loss, top1 = run.sums.fold(run.engine.sum_over_ranks(run.sums.window.clone()))
    if not math.isfinite(loss):
        error = TrainingError(
            f"the loss is {loss} at step {state.step} (epoch {state.epoch + 1}, lr {learning_rate_of_step(run, state.step - 1):g}); "
            f"the last checkpoint is {run.folder.last if run.folder.last.exists() else 'none'}; lower optim.lr, or add warm-up"
        )
        error.speaker = 0  # the sum is over all ranks, so all of them know
        raise error
    if run.record is None or run.progress is None or run.board is None:
        return
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

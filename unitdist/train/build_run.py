"""Everything that one training run holds, built in the order in which ranks can agree on it."""

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unitdist.analysis.monitor import build_monitor
from unitdist.config import Config
from unitdist.config_file import dump_config
from unitdist.data.batch import Loader
from unitdist.data.build import build_train_loader, build_val_loader
from unitdist.errors import ConfigError
from unitdist.models.build import build_model
from unitdist.sync import new_sync_group
from unitdist.train import engine as engines
from unitdist.train.agreement import agreed, from_rank_zero, lost_contact, warn
from unitdist.train.batch_split import BatchSplit
from unitdist.train.checkpoint import bytes_of, load_model_state, read_checkpoint, remove_leftovers
from unitdist.train.ema import WeightAverage
from unitdist.train.engine import Engine
from unitdist.train.environment import append_environment
from unitdist.train.init_from import init_model, read_weights
from unitdist.train.metrics import Record, TrainSums
from unitdist.train.optim import MOMENTS, build_optimizer
from unitdist.train.progress import Progress
from unitdist.train.rank_log import RankLog
from unitdist.train.resume import check_same_run, job_fingerprint
from unitdist.train.retention import check_space, go_back_to, read_newest, step_file
from unitdist.train.run_folder import RunFolder, lock_run_folder, noting_failed_start, open_run_folder, write_status
from unitdist.train.saving import load
from unitdist.train.schedule import peak_learning_rate
from unitdist.train.state import Run, TrainState
from unitdist.train.stopping import StopRequest
from unitdist.train.tensorboard import Board
from unitdist.train.timm_training import build_mixup
from unitdist.train.wandb_run import open_wandb, require_wandb
from unitdist.train.watchdog import Watchdog
from unitdist.train.writer import CheckpointWriter
from unitdist.wording import counted
from unitdist.world import World


def build_run(config: Config, engine: Engine, split: BatchSplit, resume: str | None, resources: ExitStack) -> Run:
    """Open the folder, build loaders, network and optimizer, and load the checkpoint to resume from, before DDP wraps.

    What has to be closed is put on `resources` as soon as it is open.
    """
    world = engine.world

    def open_and_read() -> tuple[RunFolder, dict[str, Any] | None, dict[str, torch.Tensor] | None]:
        if config.run.wandb:
            require_wandb()
        folder = open_run_folder(config, resume=resume)
        resources.enter_context(lock_run_folder(folder.path))
        with noting_failed_start(folder.path, world):
            remove_leftovers(folder.path)
            folder, checkpoint = find_checkpoint(folder, resume)
            start = config.model.init_from if checkpoint is None else None
            return folder, checkpoint, None if start is None else read_weights(Path(start).expanduser())

    folder, checkpoint, start_weights = from_rank_zero(world, open_and_read)
    with noting_failed_start(folder.path, world):
        return build_in(folder, checkpoint, start_weights, config, engine, split, resources)


def build_in(
    folder: RunFolder,
    checkpoint: dict[str, Any] | None,
    start_weights: dict[str, torch.Tensor] | None,
    config: Config,
    engine: Engine,
    split: BatchSplit,
    resources: ExitStack,
) -> Run:
    """`build_run` once the folder is this job's and what lies there is read."""
    world = engine.world
    stop = StopRequest(world)
    resources.callback(stop.close)
    module = build_network(config, engine, split, folder)  # looks for room on the disk before anything is written there
    start = from_rank_zero(world, lambda: f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
    with agreed(world):
        watchdog = open_watchdog(config, world, folder, resources, start=start)
    if world.is_main:
        for note in folder.notes:
            warn(world, note)
    differences: list[str] = []
    with agreed(world):
        train_loader = build_train_loader(
            config.data,
            world,
            per_rank_batch_size=split.per_rank_batch_size,
            seed=config.run.seed,
            device=engine.device,
        )
        resources.callback(train_loader.close)
        val_loader = build_val_loader(
            config.data, world, per_rank_batch_size=split.per_rank_val_batch_size, device=engine.device
        )
        resources.callback(val_loader.close)
        check_sizes(config, train_loader)
        if checkpoint is not None:
            fingerprint = job_fingerprint(config, train_loader, world_size=world.size)
            differences = check_same_run(config, fingerprint, checkpoint, source=str(folder.resume_from))
            load_model_state(module, checkpoint["model"], str(folder.resume_from))
        elif start_weights is not None:
            init_model(module, start_weights, config)
    module = module.to(engine.device)
    stop.limit_broken(train_loader)
    writer = CheckpointWriter(
        asynchronous=config.checkpoint.asynchronous,
        max_failed_saves=config.checkpoint.max_failed_saves,
        tell=lambda message: warn(world, message),
    )
    resources.callback(writer.close)
    run = Run(
        config=config,
        folder=folder,
        engine=engine,
        split=split,
        train_loader=train_loader,
        val_loader=val_loader,
        state=TrainState(),
        sums=TrainSums(engine.device),
        stop=stop,
        writer=writer,
        watchdog=watchdog,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),  # before ZeRO 3 shards them
        mixup=build_mixup(
            mixup_alpha=config.train.mixup_alpha,
            cutmix_alpha=config.train.cutmix_alpha,
            label_smoothing=config.train.label_smoothing,
            num_classes=config.model.num_classes,
        ),
    )
    if config.train.compile:
        module.compile()
    optimizer = build_optimizer(
        module,
        config.optim,
        learning_rate=peak_learning_rate(config.optim, global_batch_size=config.data.global_batch_size),
        recordable=config.train.cuda_graph,
    )
    engines.prepare(engine, module, optimizer)
    if config.train.ema_decay is not None:
        run.average = WeightAverage(module, config.train.ema_decay)
    if world.is_main:
        print(introduction(run), flush=True)  # the monitor's first look may take minutes on a CPU
    run.monitor = build_monitor(config, module, world, device=engine.device, agreed=partial(agreed, world))
    if checkpoint is not None:
        load(run, checkpoint)
        put_folder_in_order(run, checkpoint)
    if world.is_main:
        open_records(run, differences, resources)
    return run


def open_watchdog(config: Config, world: World, folder: RunFolder, resources: ExitStack, *, start: str) -> Watchdog:
    """This rank's log and watchdog. Raises ConfigError when the rank cannot write to the run's folder."""
    try:
        log = resources.enter_context(RankLog(folder.path, world, start=start))
        watchdog = Watchdog(config.health, world, folder.path, log, start=start)
    except OSError as error:
        raise ConfigError(f"run.folder: rank {world.rank} cannot write to {folder.path} ({error.strerror})") from None
    resources.callback(watchdog.close)

    def tell(_: object, error: BaseException | None, __: object) -> None:
        """Of what ends the start of the run, before `train` has a run whose watchdog it could tell."""
        if isinstance(error, Exception):
            watchdog.failed(error, lost_contact=isinstance(error, RuntimeError) and lost_contact(error))

    resources.push(tell)
    return watchdog


def build_network(config: Config, engine: Engine, split: BatchSplit, folder: RunFolder) -> nn.Module:
    """The network on the CPU, the same on every rank. Raises ConfigError, also when its checkpoints would not fit on the disk."""
    world = engine.world
    group = new_sync_group(split.sync_group_size) if 1 < split.sync_group_size < world.size else None
    with agreed(world):
        torch.manual_seed(config.run.seed)
        module = build_model(
            config.model, image_size_px=config.data.image_size_px, process_group=group, sync=split.sync_group_size > 1
        )
        if config.train.channels_last and not engine.uses_deepspeed:  # DeepSpeed broadcasts weights as flat bytes
            module = module.to(memory_format=torch.channels_last)
        if world.is_main:
            expected = checkpoint_bytes(config, module)
            check_space(folder.path, config.checkpoint, checkpoint_bytes=expected, epochs=config.train.epochs)
    return module


def find_checkpoint(folder: RunFolder, resume: str | None) -> tuple[RunFolder, dict[str, Any] | None]:
    """The checkpoint to continue from, read, and the folder that names it."""
    if resume != "auto":
        return folder, None if folder.resume_from is None else read_checkpoint(folder.resume_from)
    path, checkpoint, damages = read_newest(folder.path)
    notes = list(damages)
    if checkpoint is not None and damages:
        notes.append(f"resuming from {path}, step {checkpoint['step']}, instead; the steps after it are trained again")
    return replace(folder, resume_from=path, notes=tuple(notes)), checkpoint


def put_folder_in_order(run: Run, checkpoint: dict[str, Any]) -> None:
    """After the last check that could refuse `checkpoint`: move aside what it makes void, forget best epochs without a file."""
    folder, world = run.folder, run.engine.world

    def in_order() -> list[dict[str, Any]]:
        assert folder.resume_from is not None
        moved = go_back_to(folder.path, folder.resume_from, checkpoint)
        if moved:
            warn(world, f"moved aside in {folder.path}: {', '.join(moved)}")
        return [one for one in checkpoint["metrics"].get("ranking", []) if step_file(folder.path, one["step"]).exists()]

    ranking = from_rank_zero(world, in_order)
    if "ranking" in run.state.metrics:
        run.state.metrics["ranking"] = ranking


def checkpoint_bytes(config: Config, module: nn.Module) -> int:
    """What a checkpoint of `module` will take: weights, the optimizer's moments and the averaged weights."""
    weights = bytes_of(module.state_dict())
    moments = sum(bytes_of(parameter) for parameter in module.parameters() if parameter.requires_grad)
    average = weights if config.train.ema_decay is not None else 0
    return weights + moments * MOMENTS[config.optim.name] + average


def check_sizes(config: Config, train_loader: Loader) -> None:
    """Raises ConfigError when classes or counts do not fit the config."""
    classes = len(train_loader.class_to_idx)
    if classes != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes: the model has {counted(config.model.num_classes, 'output')}, "
            f"{config.data.path or 'the data'} has {counted(classes, 'class', 'classes')}"
        )
    if train_loader.num_samples < config.data.global_batch_size:
        raise ConfigError(
            f"data.global_batch_size: 0 steps per epoch: {counted(train_loader.num_samples, 'training image')}, "
            f"batch {config.data.global_batch_size}"
        )


def introduction(run: Run) -> str:
    """What will be run, in a few lines."""
    config, world = run.config, run.engine.world
    ignored = run.train_loader.ignored + run.val_loader.ignored
    others = f" ({counted(ignored, 'other file')} ignored)" if ignored else ""
    peak = peak_learning_rate(config.optim, global_batch_size=config.data.global_batch_size)
    statistics = run.split.sync_group_size * run.split.per_rank_batch_size
    text = (
        f"{config.model.name} ({config.model.norm}, {run.num_parameters:,} parameters) on {world.size} x {run.engine.device.type}, "
        f"{config.train.engine}, {config.train.precision}; run folder {run.folder.path}\n"
        f"batch {run.split.in_words(config, world)}; statistics over {counted(statistics, 'image')}; peak lr {peak:g}\n"
        f"{run.train_loader.num_samples:,} training and {run.val_loader.num_samples:,} validation images, "
        f"{counted(config.model.num_classes, 'class', 'classes')}{others}; "
        f"{counted(config.train.epochs, 'epoch')} x {counted(run.steps_per_epoch, 'step')}, "
        f"{counted(run.total_steps, 'step')} to run"
    )
    if config.analysis.every_epochs:
        text += "\nthe live monitor takes a first look at the network (analysis.every_epochs=0 leaves it out)"
    return text


def open_records(run: Run, differences: list[str], resources: ExitStack) -> None:
    """Rank 0: write the resolved config, open metrics, TensorBoard and progress, and say from where the run goes on.

    differences: in what the checkpoint's job differed.
    """
    config, state = run.config, run.state

    def tell(message: str) -> None:
        warn(run.engine.world, message)

    write_status(run.folder.path, "running", step=state.step)
    (run.folder.path / "config.yaml").write_text(dump_config(config))
    run.record = Record(run.folder.path / "metrics.jsonl", resumed_step=state.step, tell=tell)
    append_environment(run.folder.path, run.engine.world, resumed_step=state.step)
    run.board = Board(
        run.folder.path / "tensorboard",
        config,
        resumed_step=state.step,
        tell=tell,
        wandb=open_wandb(run.folder.path, config),
    )
    run.progress = Progress(total_steps=run.total_steps, done_steps=state.step, shown=True)
    resources.callback(run.board.close)
    resources.callback(run.progress.close)
    if not state.step and config.model.init_from is not None:
        run.progress.say(f"started from the weights in {config.model.init_from}")
    if state.step:
        changes = "".join(f"; {difference}" for difference in differences)
        run.progress.say(
            f"resumed from {run.folder.resume_from} at step {state.step} (epoch {state.epoch + 1}){changes}"
        )

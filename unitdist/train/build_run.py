"""Everything that one training run holds, built in the order in which ranks can agree on it."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from unitdist.analysis.monitor import build_monitor
from unitdist.config import Config
from unitdist.config_file import dump_config
from unitdist.data.batch import Loader
from unitdist.data.build import build_train_loader, build_val_loader
from unitdist.errors import ConfigError
from unitdist.models.build import build_model
from unitdist.sync import new_sync_group
from unitdist.train import engine as engines
from unitdist.train.agreement import agreed, from_rank_zero
from unitdist.train.batch_split import BatchSplit
from unitdist.train.checkpoint import load_model_state, read_checkpoint, remove_leftovers
from unitdist.train.ema import WeightAverage
from unitdist.train.engine import Engine
from unitdist.train.environment import append_environment
from unitdist.train.init_from import init_model, read_weights
from unitdist.train.metrics import Record, TrainSums
from unitdist.train.optim import build_optimizer
from unitdist.train.progress import Progress
from unitdist.train.resume import check_same_run, job_fingerprint
from unitdist.train.run_folder import RunFolder, lock_run_folder, open_run_folder, write_status
from unitdist.train.saving import load
from unitdist.train.schedule import peak_learning_rate
from unitdist.train.state import Run, TrainState
from unitdist.train.stopping import StopRequest
from unitdist.train.tensorboard import Board
from unitdist.train.timm_training import build_mixup
from unitdist.train.wandb_run import open_wandb, require_wandb


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
        remove_leftovers(folder.path)
        if folder.resume_from is not None:
            return folder, read_checkpoint(folder.resume_from), None
        start = config.model.init_from
        return folder, None, None if start is None else read_weights(Path(start).expanduser())

    folder, checkpoint, start_weights = from_rank_zero(world, open_and_read)
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
    differences: list[str] = []
    group = new_sync_group(split.sync_group_size) if 1 < split.sync_group_size < world.size else None
    with agreed(world):
        torch.manual_seed(config.run.seed)
        module = build_model(
            config.model, image_size_px=config.data.image_size_px, process_group=group, sync=split.sync_group_size > 1
        )
        if config.train.channels_last and not engine.uses_deepspeed:  # DeepSpeed broadcasts weights as flat bytes
            module = module.to(memory_format=torch.channels_last)
        if checkpoint is not None:
            fingerprint = job_fingerprint(config, train_loader, world_size=world.size)
            differences = check_same_run(config, fingerprint, checkpoint, source=str(folder.resume_from))
            load_model_state(module, checkpoint["model"], str(folder.resume_from))
        elif start_weights is not None:
            init_model(module, start_weights, config)
    module = module.to(engine.device)
    stop = StopRequest(world)
    resources.callback(stop.close)
    stop.limit_broken(train_loader)
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
    )
    engines.prepare(engine, module, optimizer)
    if config.train.ema_decay is not None:
        run.average = WeightAverage(module, config.train.ema_decay)
    run.monitor = build_monitor(config, module, world, device=engine.device)
    if checkpoint is not None:
        load(run, checkpoint)
    if world.is_main:
        open_records(run, differences, resources)
    return run


def check_sizes(config: Config, train_loader: Loader) -> None:
    """Raises ConfigError when classes or counts do not fit the config."""
    classes = len(train_loader.class_to_idx)
    if classes != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes: the model has {config.model.num_classes} outputs, {config.data.path or 'the data'} has {classes} classes"
        )
    if train_loader.num_samples < config.data.global_batch_size:
        raise ConfigError(
            f"data.global_batch_size: 0 steps per epoch: {train_loader.num_samples} training images, batch {config.data.global_batch_size}"
        )


def open_records(run: Run, differences: list[str], resources: ExitStack) -> None:
    """Rank 0: write the resolved config, open metrics, TensorBoard and progress, and say what will be run.

    differences: in what the checkpoint's job differed.
    """
    config, state = run.config, run.state
    write_status(run.folder.path, "running", step=state.step)
    (run.folder.path / "config.yaml").write_text(dump_config(config))
    run.record = Record(run.folder.path / "metrics.jsonl", resumed_step=state.step)
    append_environment(run.folder.path, run.engine.world, resumed_step=state.step)
    run.board = Board(
        run.folder.path / "tensorboard", config, resumed_step=state.step, wandb=open_wandb(run.folder.path, config)
    )
    run.progress = Progress(total_steps=run.total_steps, done_steps=state.step, shown=True)
    resources.callback(run.board.close)
    resources.callback(run.progress.close)
    world = run.engine.world
    ignored = run.train_loader.ignored + run.val_loader.ignored
    peak = peak_learning_rate(config.optim, global_batch_size=config.data.global_batch_size)
    statistics = run.split.sync_group_size * run.split.per_rank_batch_size
    run.progress.say(
        f"{config.model.name} ({config.model.norm}, {run.num_parameters:,} parameters) on {world.size} x {run.engine.device.type}, "
        f"{config.train.engine}, {config.train.precision}; run folder {run.folder.path}\n"
        f"batch {config.data.global_batch_size} = {world.size} ranks x {config.train.accumulation_steps} accumulation x "
        f"{run.split.per_rank_batch_size} images; statistics over {statistics} images; peak lr {peak:g}\n"
        f"{run.train_loader.num_samples:,} training and {run.val_loader.num_samples:,} validation images, "
        f"{config.model.num_classes} classes{f' ({ignored:,} other files ignored)' if ignored else ''}; "
        f"{config.train.epochs} epochs x {run.steps_per_epoch} steps, {run.total_steps} steps to run"
    )
    if state.step:
        changes = "".join(f"; {difference}" for difference in differences)
        run.progress.say(
            f"resumed from {run.folder.resume_from} at step {state.step} (epoch {state.epoch + 1}){changes}"
        )

"""The batch of a step that was not finite, in files that replay it: `python tools/replay_batch.py FOLDER`.

A step's folder holds one file a rank. Keys: format, config, step, epoch, rank, world_size, sync_group_size, loss, gradient_norm,
batches (list of {"images", "labels", "targets", "sample_ids"} by micro-batch, as the network got them), and in rank 0's file model,
the state dict before the step.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unitdist.config_file import config_from_dict, config_to_dict
from unitdist.data.batch import Batch
from unitdist.errors import CheckpointError, ConfigError
from unitdist.models.build import build_model
from unitdist.train import engine as engines
from unitdist.train.agreement import warn
from unitdist.train.checkpoint import load_model_state, read_file, save_checkpoint
from unitdist.train.state import Run
from unitdist.train.timm_training import mix
from unitdist.wording import counted

FORMAT = "unitdist-batch-1"
KEPT = 3
"""Steps of a run whose batches are kept; those of later ones are not written."""


def prepare(run: Run, batch: Batch, micro_step: int) -> tuple[Tensor, Tensor, Tensor]:
    """A micro-batch as the network gets it: images, hard labels and targets (labels, or mixup's soft ones) on the device."""
    images = batch.images.to(run.engine.device, non_blocking=True)
    labels = batch.labels.to(run.engine.device, non_blocking=True)
    if run.mixup is None:
        return images, labels, labels
    seed = (run.config.run.seed, run.state.step, micro_step, run.engine.world.rank)
    images, targets = mix(run.mixup, images, labels, seed=seed)
    return images, labels, targets


def save_batch(run: Run, batches: list[Batch], *, losses: list[float], gradient_norms: list[float]) -> str:
    """Every rank writes its part; returns what to say about it. A disk that is full is told, and the run goes its way."""
    folder = run.folder.path / "nonfinite" / f"step_{run.state.step + 1:08d}"
    if len([other for other in folder.parent.glob("step_*") if other != folder]) >= KEPT:
        return ""
    world, engine = run.engine.world, run.engine
    content: dict[str, Any] = {
        "format": FORMAT,
        "config": config_to_dict(run.config),
        "step": run.state.step + 1,
        "epoch": run.state.epoch + 1,
        "rank": world.rank,
        "world_size": world.size,
        "sync_group_size": run.split.sync_group_size,
        "loss": losses[world.rank],
        "gradient_norm": gradient_norms[world.rank],
        "batches": [_plain(run, batch, micro_step) for micro_step, batch in enumerate(batches)],
    }
    if world.is_main:
        content["model"] = engines.model_state(engine)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder / f"rank_{world.rank:04d}.pt", content)
    except (OSError, CheckpointError) as error:
        warn(world, f"the batch that is not finite cannot be kept: {error}")
        return ""
    return f"its batch is in {folder} (tools/replay_batch.py replays it); "


def _plain(run: Run, batch: Batch, micro_step: int) -> dict[str, Tensor]:
    images, labels, targets = prepare(run, batch, micro_step)
    parts = {"images": images, "labels": labels, "targets": targets, "sample_ids": batch.sample_ids}
    return {name: value.to("cpu", copy=True) for name, value in parts.items()}


def read_step(folder: Path) -> list[dict[str, Any]]:
    """The files of a step in rank order. Raises ConfigError, CheckpointError."""
    parts = [read_file(path) for path in sorted(folder.glob("rank_*.pt"))]
    if not parts:
        raise ConfigError(f"{folder} holds no rank_*.pt; give a folder such as RUN/nonfinite/step_00000017")
    if any(not isinstance(part, dict) or part.get("format") != FORMAT for part in parts):
        raise CheckpointError(f"{folder} holds other files than batches of unitdist (no format: {FORMAT})")
    if [part["rank"] for part in parts] != list(range(parts[0]["world_size"])):
        raise CheckpointError(f"{folder} lacks ranks: {len(parts)} files of {parts[0]['world_size']}")
    return parts


def replay(folder: Path) -> str:
    """Run the step again in this process, on the CPU; returns the report.

    Ranks that share batch statistics go through the network as one batch, which gives the same statistics. Gradients are those
    of the mean loss over ranks and micro-batches, as in the job; rounding differs from it.
    """
    parts = read_step(folder)
    config = config_from_dict(parts[0]["config"])
    model = build_model(config.model, image_size_px=config.data.image_size_px, sync=False)
    load_model_state(model, parts[0]["model"], str(folder))
    model.train()
    bad = _watch_outputs(model)
    per_group, losses = parts[0]["sync_group_size"], []
    smoothing = config.train.label_smoothing if not (config.train.mixup_alpha or config.train.cutmix_alpha) else 0.0
    dtype = engines.AUTOCAST_DTYPES[config.train.precision]
    groups = [parts[start : start + per_group] for start in range(0, len(parts), per_group)]
    for group in groups:
        for micro_step in range(len(group[0]["batches"])):
            batch = {
                key: torch.cat([part["batches"][micro_step][key] for part in group]) for key in ("images", "targets")
            }
            with torch.autocast("cpu", dtype=dtype, enabled=config.train.precision != "fp32"):
                logits = model(batch["images"])
            loss = nn.functional.cross_entropy(logits.float(), batch["targets"], label_smoothing=smoothing)
            (loss / (len(groups) * len(group[0]["batches"]))).backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
    norm = torch.nn.utils.get_total_norm([value.grad for value in model.parameters() if value.grad is not None])
    saved = ", ".join(f"{part['loss']:g}" for part in parts)
    lines = [
        f"step {parts[0]['step']}, epoch {parts[0]['epoch']}; {counted(len(parts), 'rank')}, samples "
        + "; ".join(str(batch["sample_ids"].tolist()) for part in parts for batch in part["batches"]),
        f"in the job:  loss by rank {saved}; norm of the gradient {parts[0]['gradient_norm']:g}",
        f"replayed:    loss {', '.join(f'{loss:g}' for loss in losses)}; norm of the gradient {float(norm):g}",
        f"first module whose output is not finite: {bad[0] if bad else 'none'}",
    ]
    images = [batch["images"] for part in parts for batch in part["batches"]]
    if not all(bool(value.isfinite().all()) for value in images):
        lines.append("the images themselves are not finite")
    return "\n".join(lines)


def _watch_outputs(model: nn.Module) -> list[str]:
    """A list that fills with the names of modules without children whose output is not finite, in the order of the forward."""
    bad: list[str] = []

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            bad.append(name)

    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
    return bad

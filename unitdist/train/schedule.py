"""The learning rate as a pure function of the step, so that a resume cannot shift it."""

import math

from unitdist.config import OptimConfig, ScheduleConfig


def peak_learning_rate(config: OptimConfig, *, global_batch_size: int) -> float:
    """`optim.lr`, scaled linearly from its reference batch to the batch of this run (Goyal et al., 2017)."""
    return config.lr * global_batch_size / (config.reference_batch_size or global_batch_size)


def learning_rate_share(config: ScheduleConfig, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (0 is the first), in [0, 1].

    Milestones count epochs from 1, as the paper does: with 31 the 31st epoch is the first at the lower rate.
    """
    epochs_done = step / steps_per_epoch
    if epochs_done < config.warmup_epochs:
        progress = epochs_done / config.warmup_epochs
        return config.warmup_start_share + (1 - config.warmup_start_share) * progress
    if config.name == "step":
        current_epoch = step // steps_per_epoch + 1
        return config.factor ** sum(milestone <= current_epoch for milestone in config.milestones_epochs)
    if config.name == "cosine":
        progress = min(1.0, (epochs_done - config.warmup_epochs) / (epochs - config.warmup_epochs))
        return config.min_lr_share + (1 - config.min_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0

"""The training room's door to timm: LARS, LAMB, mixup and cutmix."""

from typing import Any

import numpy
import torch
from torch import Tensor


def build_timm_optimizer(
    name: str, groups: list[dict[str, object]], *, learning_rate: float, momentum: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """timm's `Lars` (momentum) or `Lamb` (betas) over parameter groups."""
    from timm.optim import Lamb, Lars

    if name == "lars":
        lars: torch.optim.Optimizer = Lars(groups, lr=learning_rate, momentum=momentum)
        return lars
    lamb: torch.optim.Optimizer = Lamb(groups, lr=learning_rate, betas=betas)
    return lamb


def build_mixup(*, mixup_alpha: float, cutmix_alpha: float, label_smoothing: float, num_classes: int) -> Any | None:
    """timm's `Mixup`, or None where both are off."""
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha, label_smoothing=label_smoothing, num_classes=num_classes
    )


def mix(mixup: Any, images_nchw: Tensor, labels_n: Tensor, *, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mixed images (N, C, H, W) and soft labels (N, classes). timm draws from numpy's global generator, so it is seeded
    for this one batch: the draw then depends on `seed` alone, and a resumed run mixes as the undisturbed one."""
    numpy.random.seed(numpy.random.SeedSequence(seed).generate_state(1)[0])
    if len(images_nchw) % 2:
        raise ValueError(f"mixup needs an even batch, got {len(images_nchw)}")
    # timm mixes in place; the images may be the loader's own, which the next step would mix again.
    return mixup(images_nchw.clone(), labels_n)  # type: ignore[no-any-return]

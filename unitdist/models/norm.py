"""Which normalization a net gets: Unitization, batch normalization or group normalization, each with its ReLU."""

from collections.abc import Callable

import torch.distributed as dist
from torch import nn

from unitdist.config import ModelConfig
from unitdist.errors import ConfigError
from unitdist.layers import Unitization1d, Unitization2d
from unitdist.models.synced_batch_norm import SyncedBatchNorm

NormAndRelu = Callable[[int], tuple[nn.Module, nn.Module]]
"""channels -> (norm, ReLU); the second is nn.Identity where the norm applies the ReLU itself."""


def image_norm_and_relu(config: ModelConfig, *, process_group: dist.ProcessGroup | None, sync: bool) -> NormAndRelu:
    """The norm of images (N, C, H, W) that `config.norm` names, and the ReLU behind it.

    Unitization2d applies the ReLU itself (one pass over memory); its norm divisor is `config.norm_divisor`, or left
    open where that is null. batchnorm is synchronized as Unitization is: see `synced_batch_norm`. Raises
    ConfigError, when a layer is asked for, if the groups of a groupnorm do not divide its channels.
    """

    def unitization(channels: int) -> tuple[nn.Module, nn.Module]:
        norm = Unitization2d(
            channels,
            eps=config.norm_eps,
            momentum=config.norm_momentum,
            norm_divisor=config.norm_divisor,
            norm_scope=config.norm_scope,
            activation="relu",
            process_group=process_group,
            sync=sync,
        )
        return norm, nn.Identity()

    def batchnorm(channels: int) -> tuple[nn.Module, nn.Module]:
        if has_peers(process_group, sync=sync):
            return SyncedBatchNorm(
                channels, config.norm_eps, config.norm_momentum, process_group=process_group
            ), nn.ReLU()
        return nn.BatchNorm2d(channels, config.norm_eps, config.norm_momentum), nn.ReLU()

    return {"unitization": unitization, "batchnorm": batchnorm, "groupnorm": _groupnorm(config)}[config.norm]


def vector_norm_and_relu(config: ModelConfig, *, process_group: dist.ProcessGroup | None, sync: bool) -> NormAndRelu:
    """The norm of vectors (N, C) that `config.norm` names, and the ReLU behind it.

    Never fused: the normalized outputs before the ReLU are what Fig. 2 measures, and they are the norm module's
    output in every arm. Unitization1d has n = 1, so `config.norm_divisor` must be null (ConfigError).
    """
    if config.norm_divisor is not None:
        raise ConfigError(
            f"model.norm_divisor: {config.norm_divisor}: {config.name} normalizes vectors, whose n is 1; leave it null"
        )

    def unitization(channels: int) -> tuple[nn.Module, nn.Module]:
        norm = Unitization1d(
            channels, eps=config.norm_eps, momentum=config.norm_momentum, process_group=process_group, sync=sync
        )
        return norm, nn.ReLU()

    def batchnorm(channels: int) -> tuple[nn.Module, nn.Module]:
        if has_peers(process_group, sync=sync):
            return SyncedBatchNorm(
                channels, config.norm_eps, config.norm_momentum, process_group=process_group
            ), nn.ReLU()
        return nn.BatchNorm1d(channels, config.norm_eps, config.norm_momentum), nn.ReLU()

    return {"unitization": unitization, "batchnorm": batchnorm, "groupnorm": _groupnorm(config, smallest_group=2)}[
        config.norm
    ]


def has_peers(process_group: dist.ProcessGroup | None, *, sync: bool) -> bool:
    """True where statistics are to be synchronized and there is more than one rank to synchronize with."""
    return sync and dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1


def _groupnorm(config: ModelConfig, smallest_group: int = 1) -> NormAndRelu:
    """GroupNorm by number of groups or by channels per group; the other follows from the layer's channels."""

    def groupnorm(channels: int) -> tuple[nn.Module, nn.Module]:
        key = "group_norm_groups" if config.group_norm_groups is not None else "group_norm_channels"
        given = config.group_norm_groups or config.group_norm_channels or 1
        if channels % given:
            raise ConfigError(
                f"model.{key}: {given} does not divide the {channels} channels of a layer of {config.name}"
            )
        groups = given if config.group_norm_groups is not None else channels // given
        if channels // groups < smallest_group:
            raise ConfigError(
                f"model.{key}: {given} puts each of {channels} units of {config.name} in a group of its own, "
                f"which leaves nothing of it; a group needs >= {smallest_group} units"
            )
        return nn.GroupNorm(groups, channels, eps=config.norm_eps), nn.ReLU()

    return groupnorm

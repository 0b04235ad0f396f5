"""timm's models by name, `timm:NAME`: created without pretrained weights, their batch norms as the config says."""

from types import ModuleType

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unitdist.config import ModelConfig
from unitdist.errors import ConfigError
from unitdist.layers import convert_unitization
from unitdist.models.nearest import did_you_mean
from unitdist.models.norm import has_peers
from unitdist.models.synced_batch_norm import SyncedBatchNorm

PREFIX = "timm:"


def build_timm_model(config: ModelConfig, *, process_group: dist.ProcessGroup | None, sync: bool) -> nn.Module:
    """The timm model that `config.name` names, randomly initialized by timm.

    unitization: every BatchNorm becomes Unitization by `convert_unitization`, its activation carried over; eps and
    momentum stay the model's own. batchnorm: timm's model as it is, synchronized where there are several ranks.
    Raises ConfigError: timm not installed, unknown model (with the nearest names), a norm it cannot have.
    """
    name = config.name.removeprefix(PREFIX)
    timm = _import_timm(config.name)
    if not timm.is_model(name):
        near = did_you_mean(name.partition(".")[0], timm.list_models())
        raise ConfigError(f"model.name: timm {timm.__version__} has no model {name!r}{near}; see timm.list_models()")
    if config.norm == "groupnorm":
        raise ConfigError(
            f"model.norm: groupnorm is for unitdist's own nets; {config.name} can have unitization or batchnorm"
        )
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=config.num_classes)
    if config.norm == "batchnorm":
        return _synchronize_batch_norms(model, process_group) if has_peers(process_group, sync=sync) else model
    return convert_unitization(
        model, norm_divisor=config.norm_divisor, norm_scope=config.norm_scope, process_group=process_group, sync=sync
    )


class SyncedBatchNormAct(SyncedBatchNorm):
    """SyncedBatchNorm followed by a timm norm+act layer's `drop` and `act`, under the same parameter names."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """act(drop(SyncedBatchNorm(input))), of the input's shape."""
        y: Tensor = self.act(self.drop(super().forward(input)))
        return y


def _import_timm(asked_for: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"model.name: {asked_for} needs timm, which cannot be imported ({error}): pip install timm"
        ) from None
    return timm  # type: ignore[no-any-return]


def _synchronize_batch_norms(module: nn.Module, process_group: dist.ProcessGroup | None) -> nn.Module:
    """Replace every batch norm from `module` down by `SyncedBatchNorm` with the same tensors; returns the new module."""
    if isinstance(module, _BatchNorm):
        return _synced(module, process_group)
    for name, child in module.named_children():
        setattr(module, name, _synchronize_batch_norms(child, process_group))
    return module


def _synced(norm: _BatchNorm, process_group: dist.ProcessGroup | None) -> SyncedBatchNorm:
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    kind = SyncedBatchNorm if act is None else SyncedBatchNormAct
    synced = kind(norm.num_features, norm.eps, norm.momentum, process_group=process_group)
    if isinstance(synced, SyncedBatchNormAct):
        synced.drop, synced.act = drop or nn.Identity(), act or nn.Identity()
    synced.weight, synced.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(synced, name, buffer)
    return synced.train(norm.training)
